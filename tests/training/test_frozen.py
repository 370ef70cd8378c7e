"""The cache of frozen activations: the same training with less sent, or a reason why not."""

from __future__ import annotations

import dataclasses
import logging
import stat

import pytest
import small
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import ciphertune
from ciphertune import LoraTrainer
from ciphertune.cache import cache_folder, entries
from ciphertune.errors import TrainingError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import PluginManager
from ciphertune.training.frozen_rows import RowStore

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.usefixtures("empty_cache"),
]

BLOCKS = 4


def adapted(
    name="LlamaForCausalLM", blocks=(3,), targets=("q_proj", "v_proj"), to="clear", embeddings=False, **changes
):
    model = small.model(name, num_hidden_layers=BLOCKS, **changes)
    for parameter in model.parameters():  # Small weights hide mistakes.
        nn.init.normal_(parameter, std=0.2)
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=list(targets), layers_to_transform=list(blocks))
    model = get_peft_model(model, lora)
    return ciphertune.outsource(model, to, embeddings=embeddings, plugins=PluginManager())


def texts(lengths=(8, 5, 7, 3, 6, 8), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 96, (length,), generator=generator) for length in lengths]


def batch_of(rows, left=False):
    width = max(map(len, rows))
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place], labels[i, place] = row, 1, row
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Shuffled:
    """Batches of two, of other rows each epoch, and so padded otherwise."""

    def __init__(self, left=False, rows=None):
        self.rows = texts() if rows is None else rows
        self.left = left

    def __len__(self):
        return len(self.rows) // 2

    def __iter__(self):
        order = torch.randperm(len(self.rows)).tolist()
        for at in range(0, len(order), 2):
            yield batch_of([self.rows[i] for i in order[at : at + 2]], self.left)


class Recorder:
    def __init__(self, asked):
        self.asked = asked

    @hookimpl
    def ciphertune_after_reply(self, exchange):
        self.asked += exchange.layers


def losses(model, data, cache, epochs=3, eval_data=None, **settings):
    """Losses of a run, its evaluations, and the bytes of each step and evaluation."""
    torch.manual_seed(5)
    session = ciphertune.session_of(model)
    trainer = LoraTrainer(
        model, learning_rate=0.02, epochs=epochs, frozen_cache=cache, plugins=PluginManager(), **settings
    )
    history = trainer.train(data, eval_data)
    return history.losses, history.evaluations, session.traffic.bytes_up + session.traffic.bytes_down


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("to", ["clear", "simulation"])
def test_losses_are_those_without_and_less_is_sent(to, left):
    plain, judged, sent = losses(adapted(to=to), Shuffled(left), 0, eval_data=[batch_of(texts(seed=2))])
    kept, judged_too, sent_less = losses(adapted(to=to), Shuffled(left), 10, eval_data=[batch_of(texts(seed=2))])
    atol = 1e-5 if to == "clear" else 0.05
    torch.testing.assert_close(torch.tensor(kept), torch.tensor(plain), atol=atol, rtol=0)
    for one, other in zip(judged, judged_too, strict=True):
        assert one["eval_loss"] == pytest.approx(other["eval_loss"], abs=atol)
    # Of nine steps, three are as before. Padding before a text is part of it, so rows are other ones where it differs.
    assert sent_less < (0.95 if left else 0.65) * sent


OTHERS = {
    "gpt-neox": ("GPTNeoXForCausalLM", ["query_key_value"]),
    "bert": ("BertForMaskedLM", ["query", "value"]),
    "mixtral": ("MixtralForCausalLM", ["q_proj"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind):
    name, targets = OTHERS[kind]
    changes = {"num_key_value_heads": 2} if kind == "mixtral" else {}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind == "bert" else {}
    models = [adapted(name, (2, 3), targets, **changes, **dropouts) for _ in range(2)]
    plain, _, sent = losses(models[0], Shuffled(), 0, epochs=2)
    kept, _, sent_less = losses(models[1], Shuffled(), 10, epochs=2)
    torch.testing.assert_close(torch.tensor(kept), torch.tensor(plain), atol=1e-4, rtol=0)
    assert sent_less < 0.9 * sent, sent_less / sent


def test_blocks_of_ones_own_and_batches_that_are_tuples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.blocks(x))

    def made():
        torch.manual_seed(0)
        net = Net()
        net.blocks.requires_grad_(False)
        return ciphertune.outsource(net, "clear", layers="blocks.*", plugins=PluginManager())

    data = [(torch.randn(3, 6), torch.randint(2, (3,))) for _ in range(2)]
    plain, _, sent = losses(made(), data, 0, loss_fn=nn.CrossEntropyLoss())
    kept, _, sent_less = losses(made(), data, 1, loss_fn=nn.CrossEntropyLoss())
    torch.testing.assert_close(torch.tensor(kept), torch.tensor(plain), atol=1e-6, rtol=0)
    assert sent_less == sent // 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_interleaving(reentrant):
    def made():
        model = adapted()
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    plain, _, sent = losses(made(), Shuffled(), 0, accumulation=3, interleave=2)
    kept, _, sent_less = losses(made(), Shuffled(), 10, accumulation=3, interleave=2)
    torch.testing.assert_close(torch.tensor(kept), torch.tensor(plain), atol=1e-5, rtol=0)
    assert sent_less < 0.65 * sent


def test_an_embedding_at_the_workers_is_asked_in_the_first_epoch_alone():
    plain = losses(adapted(embeddings=True), Shuffled(), 0)[0]
    model, asked = adapted(embeddings=True), []
    session = ciphertune.session_of(model)
    session.plugins.register(Recorder(asked))
    kept = losses(model, Shuffled(), 10)[0]
    torch.testing.assert_close(torch.tensor(kept), torch.tensor(plain), atol=1e-5, rtol=0)
    assert sum("embed_tokens" in layer for layer in asked) == 3


def test_another_run_finds_what_this_one_kept():
    first = losses(adapted(), Shuffled(), 10, epochs=1)
    again = losses(adapted(), Shuffled(), 10, epochs=1)
    assert again[0] == pytest.approx(first[0], abs=1e-5)
    assert again[2] < 0.4 * first[2]
    other = small.model("LlamaForCausalLM", num_hidden_layers=BLOCKS)
    changed = ciphertune.outsource(
        get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[3])), "clear"
    )
    assert losses(changed, Shuffled(), 10, epochs=1)[2] > 0.9 * first[2]
    assert {entry.part for entry in entries()} == {"activations"}
    assert len(entries()) == 2


def test_equal_examples_are_sent_as_often_as_they_are_there():
    """A worker must not learn that two examples are equal."""
    same, other = [texts()[0]] * 6, texts((8,) * 6, seed=9)
    sent = [losses(adapted(), Shuffled(rows=rows), 10, epochs=2)[2] for rows in (same, other)]
    assert sent[0] == sent[1]


def test_what_is_on_disk_is_unreadable_bounded_and_checked(caplog):
    store = RowStore(b"\1" * 32, 1 << 20)
    row = torch.arange(1024, dtype=torch.float32).reshape(4, 256)
    assert store.write(b"a", row)
    read = store.read(b"a", torch.device("cpu"))
    assert read is not None
    assert torch.equal(read, row)
    (file,) = [path for path in cache_folder("activations").rglob("*") if path.is_file() and path.stat().st_size]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert row.numpy().tobytes()[64:128] not in file.read_bytes()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        assert store.read(b"a", torch.device("cpu")) is None
    assert "made anew" in caplog.text
    assert not file.exists()
    wrote = [store.write(str(i).encode(), row) for i in range(300)]
    assert wrote[0] and not wrote[-1] and store.full  # noqa: PT018
    assert sum(entry.nbytes for entry in entries("activations")) <= 1 << 20
    store.close()


def test_rows_that_find_no_room_are_computed_again(monkeypatch):
    monkeypatch.setattr(RowStore, "_room", lambda self, nbytes: False)
    plain, _, sent = losses(adapted(), Shuffled(), 0)
    kept, _, sent_too = losses(adapted(), Shuffled(), 10)
    assert kept == pytest.approx(plain, abs=1e-5)
    assert sent_too == sent


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: adapted(blocks=(0, 3)), "no block lies below"),
        (lambda: adapted("GPTNeoXForCausalLM", (3,), ["query_key_value"], hidden_dropout=0.1), "random numbers"),
        (lambda: adapted("BertForMaskedLM", (3,), ["query"]), "random numbers"),
        (lambda: adapted(output_hidden_states=True), "output_hidden_states"),
    ],
)
def test_where_it_cannot_be_right_it_is_refused(make, why):
    with pytest.raises(TrainingError, match=f"frozen_cache: .*{why}"):
        losses(make(), Shuffled(), 10)


def test_embeddings_that_are_trained_leave_nothing_frozen():
    model = adapted()
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="no block lies below"):
        losses(model, Shuffled(), 10)


def test_data_that_is_drawn_anew_is_noticed(caplog):
    class Drawn(Shuffled):
        def __iter__(self):
            for batch in super().__iter__():
                batch["input_ids"] = torch.randint(1, 96, batch["input_ids"].shape)
                yield batch

    with caplog.at_level(logging.WARNING):
        losses(adapted(), Drawn(), 10, epochs=4)
    assert caplog.text.count("frozen_cache has no effect any more") == 1


def test_the_model_is_as_it_was_afterwards():
    model = adapted()
    kinds = [type(module) for module in model.modules()]
    losses(model, Shuffled(), 10, epochs=1)
    assert [type(module) for module in model.modules()] == kinds
    assert not any("_frozen_last" in vars(module) for module in model.modules())


def test_a_run_that_is_resumed_goes_on_with_what_is_kept(tmp_path):
    whole = losses(adapted(), Shuffled(), 10, checkpoint_dir=tmp_path / "a")[0]
    losses(adapted(), Shuffled(), 10, epochs=1, checkpoint_dir=tmp_path / "b")
    torch.manual_seed(5)
    trainer = LoraTrainer(
        adapted(), learning_rate=0.02, epochs=3, frozen_cache=10, plugins=PluginManager(), checkpoint_dir=tmp_path / "b"
    )
    assert trainer.train(Shuffled(), resume=True).losses == pytest.approx(whole, abs=1e-5)


def test_rows_of_packed_texts_know_their_positions():
    """Equal tokens at other positions are other rows."""
    ids = torch.stack([texts()[0]] * 2)
    positions = torch.stack([torch.arange(8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])])
    data = [{"input_ids": ids, "labels": ids, "position_ids": positions}]
    plain = losses(adapted(), data, 0)[0]
    assert losses(adapted(), data, 10)[0] == pytest.approx(plain, abs=1e-5)


def test_the_plan_counts_what_later_epochs_send():
    from ciphertune.planning.plan import make_plan

    plan = make_plan("smollm2", "mlwe", first_block=23, measure=False)
    assert plan.later is not None
    share = (plan.later.bytes_up + plan.later.bytes_down) / (plan.bytes_up + plan.bytes_down)
    assert 0.3 < share < 0.45  # seven of thirty blocks go both ways, the others only forward
    assert plan.later.kept_bytes == 4 * 576
    assert make_plan("smollm2", "mlwe", measure=False).later is None
    assert dataclasses.asdict(plan)["later"]["bytes_up"] == plan.later.bytes_up


def test_a_runs_file_says_which_blocks_and_how_much_is_kept():
    from ciphertune.runs.adapters import first_adapted_block
    from ciphertune.runs.config import parse_config

    least = {"model": {"name": "m"}, "data": {"source": "s"}, "training": {"output": "o", "frozen_cache": 64}}
    for blocks, first in (([3, 2], 2), (5, 5), ([], 0)):
        config = parse_config({**least, "lora": {"options": {"layers_to_transform": blocks}}})
        assert first_adapted_block(config) == first
        assert config.training.frozen_cache == 64


@pytest.mark.parametrize(("limit", "again"), [(0, 0), (1 << 30, 20), (50_000, 10)])
def test_a_plan_of_a_run_counts_later_epochs_as_far_as_rows_fit(limit, again):
    from types import SimpleNamespace

    from ciphertune.planning.run import Run, totals

    judged = {0: 0, 20: 2, 10: 1}[again]
    less = SimpleNamespace(bytes_up=4, bytes_down=8, seconds=None)
    later = SimpleNamespace(bytes_up=30, bytes_down=40, seconds=None, evaluation=less, kept_bytes=100)
    once = SimpleNamespace(bytes_up=10, bytes_down=20, seconds=None)
    plan = SimpleNamespace(
        evaluation=once, later=later, bytes_up=100, bytes_down=200, estimate=None, set_up_seconds=None, set_up_bytes=7
    )
    sizes = {"steps": 30, "tokens": 1, "micro_batches": 1, "interleave": 1, "length": 1, "per_epoch": 10}
    run = Run(
        **sizes, targets=("q",), first_block=2, evaluations=3, held=1, evaluation=(1,), all_tokens=1000,
        frozen_cache=limit,
    )  # fmt: skip
    found = totals(plan, run)  # type: ignore[arg-type]
    assert found.bytes_up == (30 - again) * 100 + again * 30 + (3 - judged) * 10 + judged * 4
    assert found.bytes_down == (30 - again) * 200 + again * 40 + (3 - judged) * 20 + judged * 8 + 7
