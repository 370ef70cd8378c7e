"""Checkpoints: written whole or not at all, and a resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import collections
import json
import math
import random
import shutil
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, RandomSampler

import ciphertune
from ciphertune import LoraTrainer
from ciphertune._support import atomic
from ciphertune.errors import CheckpointError, NonFiniteLossError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import PluginManager
from ciphertune.training import codec
from ciphertune.training.checkpoint import list_checkpoints

mse = nn.functional.mse_loss


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8, affine=False)  # its running statistics are state too
        self.dropout = nn.Dropout(0.3)
        self.down = nn.Linear(8, 2)

    def forward(self, x):
        return self.down(self.dropout(torch.tanh(self.norm(self.up(x)))))


class Noisy(Dataset):
    """Samples augmented from every random state of the process."""

    def __init__(self, count: int = 12, seed: int = 1, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = torch.randn(count, 2, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return self.x[index] + self.noise * noise, self.y[index]


def build(rank: int = 2):
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=rank, target_modules=["up", "down"], lora_dropout=0.2))
    return ciphertune.outsource(model, "clear", plugins=PluginManager())


def shuffled(dataset=None, **kwargs):
    return DataLoader(dataset or Noisy(), batch_size=2, shuffle=True, **kwargs)


def seeded():
    return shuffled(generator=torch.Generator().manual_seed(5))


def drawn():
    dataset = Noisy()
    sampler = RandomSampler(dataset, replacement=True, num_samples=80, generator=torch.Generator().manual_seed(5))
    return DataLoader(dataset, batch_size=7, sampler=sampler)


def listed():
    dataset = Noisy()
    return [(dataset.x[i : i + 2], dataset.y[i : i + 2]) for i in range(6)]


LOADERS = {"shuffled": shuffled, "own generator": seeded, "with replacement": drawn, "list": listed}


class StopAt:
    def __init__(self, step: int) -> None:
        self.at = step

    @hookimpl
    def ciphertune_training_step(self, step):
        if step == self.at:
            raise KeyboardInterrupt


def trainer_of(model, directory=None, *, stop=None, **kwargs):
    manager = PluginManager()
    if stop is not None:
        manager.register(StopAt(stop))
    kwargs = {"loss_fn": mse, "learning_rate": 0.02, "epochs": 3, "accumulation": 4, **kwargs}
    return LoraTrainer(model, plugins=manager, checkpoint_dir=directory, **kwargs)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def weights(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items() if t.numel()}


def metrics(history):
    steps = [{k: v for k, v in entry.items() if k != "seconds"} for entry in history.steps]
    return steps, history.evaluations


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def run(model, data, directory=None, *, resume=False, eval_data=None, seed=3, **kwargs):
    seed_everything(seed)
    trainer = trainer_of(model, directory, **kwargs)
    try:
        trainer.train(data, eval_data, resume=resume)
    except KeyboardInterrupt:
        assert kwargs.get("stop")
    return trainer


SCHEDULERS = {
    "none": None,
    "lambda": lambda o, n: lr_scheduler.LambdaLR(o, lambda step: 1 - step / (n + 1)),
    "one cycle": lambda o, n: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=n + 1),
    "multi step": lambda o, n: lr_scheduler.MultiStepLR(o, [2, 2, 4], 0.5),
    "sequential": lambda o, n: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.CosineAnnealingLR(o, 4)], [3]
    ),
}


def checkpointed(data):
    return {"checkpoint_every": 1, "eval_data": listed(), "eval_every": 2, "accumulation": 6 if data is drawn else 4}


@pytest.fixture(scope="module", params=LOADERS)
def loader_and_reference(request, tmp_path_factory):
    """Six steps in three epochs of two, with a checkpoint after each."""
    data = LOADERS[request.param]
    kwargs = checkpointed(data)
    reference = run(build(), data(), tmp_path_factory.mktemp("reference") / "run", **kwargs)
    assert reference.step == 6
    plain = run(build(), data(), None, **{**kwargs, "checkpoint_every": None})
    assert metrics(plain.history) == metrics(reference.history)  # checkpoints change nothing
    return data, reference


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_resume_is_bit_for_bit(tmp_path, loader_and_reference, stop):
    """Killed before the checkpoint of ``stop`` is written."""
    data, reference = loader_and_reference
    kwargs = checkpointed(data)
    run(build(), data(), tmp_path / "run", stop=stop, **kwargs)
    if stop == 1:
        assert not list_checkpoints(tmp_path / "run")
        return
    resumed = run(build(), data(), tmp_path / "run", resume=True, seed=99, **kwargs)
    assert metrics(resumed.history) == metrics(reference.history)
    assert [entry["epoch"] for entry in resumed.history.steps] == [1, 1, 2, 2, 3, 3]
    assert len(set(resumed.history.losses)) == 6
    assert_same(weights(resumed.model), weights(reference.model))


class AskAt:
    """Asks a run to stop, after a step or within the evaluation that follows it."""

    def __init__(self, step: int, within: bool) -> None:
        self.at, self.within, self.trainer = step, within, None

    @hookimpl
    def ciphertune_training_step(self, trainer, step):
        if step == self.at:
            self.trainer = trainer
            if not self.within:
                trainer.stop()

    def batches(self):
        for batch in listed():
            if self.within and self.trainer is not None:
                self.trainer.stop()
            yield batch


class Again:
    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_run_that_is_asked_to_stop_has_a_checkpoint_and_resumes_bit_for_bit(
    tmp_path, loader_and_reference, stop, within
):
    """Also where it was asked at a step that has an evaluation after it, which is then made on resuming."""
    data, reference = loader_and_reference
    kwargs = {**checkpointed(data), "checkpoint_every": 5}
    asks = AskAt(stop, within and stop % 2 == 0)
    trainer = trainer_of(build(), tmp_path / "run", **{k: v for k, v in kwargs.items() if k != "eval_data"})
    trainer.plugins.register(asks)
    seed_everything(3)
    trainer.train(data(), Again(asks.batches))
    assert (trainer.stopped, trainer.step) == (True, stop)
    assert list_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{stop}"
    resumed = run(build(), data(), tmp_path / "run", resume=True, seed=99, **kwargs)
    assert not resumed.stopped
    assert metrics(resumed.history) == metrics(reference.history)
    assert_same(weights(resumed.model), weights(reference.model))


def test_resume_of_an_interleaved_run_is_bit_for_bit(tmp_path):
    """With dropout, and a shuffling loader that draws from the same generator."""
    kwargs = {"checkpoint_every": 1, "interleave": 3}
    reference = run(build(), shuffled(), tmp_path / "reference", **kwargs)
    run(build(), shuffled(), tmp_path / "run", stop=4, **kwargs)
    with pytest.raises(CheckpointError, match="interleave was 3 and is None"):
        run(build(), shuffled(), tmp_path / "run", resume=True, checkpoint_every=1)
    resumed = run(build(), shuffled(), tmp_path / "run", resume=True, seed=99, **kwargs)
    assert metrics(resumed.history) == metrics(reference.history)
    assert_same(weights(resumed.model), weights(reference.model))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_resume_with_any_scheduler_and_optimizer(tmp_path, scheduler):
    kwargs = {
        "scheduler": SCHEDULERS[scheduler],
        "optimizer": lambda parameters: torch.optim.SGD(
            [{"params": parameters[:2], "lr": 0.01}, {"params": parameters[2:]}], lr=0.03, momentum=0.9
        ),
        "checkpoint_every": 2,
    }
    reference = run(build(), shuffled(), **{**kwargs, "checkpoint_every": None})
    run(build(), shuffled(), tmp_path, stop=5, **kwargs)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    resumed = run(build(), shuffled(), tmp_path, resume=True, seed=99, **kwargs)
    assert metrics(resumed.history) == metrics(reference.history)
    assert_same(weights(resumed.model), weights(reference.model))


def test_resume_after_several_interruptions_one_of_them_in_the_data(tmp_path):
    class Explosive(Noisy):
        fuse = 10**9

        def __getitem__(self, index):
            self.fuse -= 1
            if self.fuse == 0:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    reference = run(build(), shuffled(), accumulation=1)
    assert reference.step == 18
    for attempt, fuse in enumerate((20, 17)):
        dataset = Explosive()
        dataset.fuse = fuse
        trainer = trainer_of(build(), tmp_path, accumulation=1, checkpoint_every=2)
        seed_everything(3 + attempt)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(shuffled(dataset), resume=attempt > 0)
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-14"
    resumed = run(build(), shuffled(), tmp_path, resume=True, seed=77, accumulation=1, checkpoint_every=2)
    assert metrics(resumed.history) == metrics(reference.history)
    assert_same(weights(resumed.model), weights(reference.model))


def test_checkpoints_are_ordered_as_numbers_and_pruned(tmp_path):
    run(build(), listed(), tmp_path / "all", accumulation=1, checkpoint_every=1, keep_checkpoints=None, epochs=2)
    names = [path.name for path in list_checkpoints(tmp_path / "all")]
    assert names == [f"checkpoint-{step}" for step in range(1, 13)]
    run(build(), listed(), tmp_path / "two", accumulation=1, checkpoint_every=3, epochs=2, stop=11)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["checkpoint-6", "checkpoint-9"]
    for name in names[10:]:
        shutil.rmtree(tmp_path / "all" / name)
    resumed = run(
        build(),
        listed(),
        tmp_path / "all",
        resume=True,
        accumulation=1,
        checkpoint_every=1,
        keep_checkpoints=3,
        epochs=2,
    )
    assert [entry["step"] for entry in resumed.history.steps] == list(range(1, 13))
    assert [path.name for path in list_checkpoints(tmp_path / "all")] == names[-3:]


def test_by_default_each_epoch_end_has_a_checkpoint(tmp_path):
    run(build(), listed(), tmp_path, keep_checkpoints=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    run(build(), listed(), tmp_path / "sparse", keep_checkpoints=None, checkpoint_every=4)
    assert [path.name for path in list_checkpoints(tmp_path / "sparse")] == ["checkpoint-4", "checkpoint-6"]


def test_a_finished_run_resumes_to_nothing_and_may_be_extended(tmp_path):
    finished = run(build(), shuffled(), tmp_path, epochs=2)
    again = run(build(), shuffled(), tmp_path, resume=True, epochs=2)
    assert again.history == finished.history
    assert_same(weights(again.model), weights(finished.model))
    longer = run(build(), shuffled(), tmp_path, resume=True, epochs=3)
    assert metrics(longer.history) == metrics(run(build(), shuffled(), epochs=3).history)
    with pytest.raises(CheckpointError, match="beyond the 2 steps"):
        trainer_of(build(), tmp_path, epochs=1).train(shuffled(), resume=True)


LENGTHENED: dict[str, Any] = {
    "multi step": {"scheduler": SCHEDULERS["multi step"]},
    "sequential": {"scheduler": SCHEDULERS["sequential"]},
    "warming up": {"warmup_steps": 3},
    "ready-made": {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "scheduler": lambda o, n: lr_scheduler.StepLR(o, 3, 0.5),
    },
}


@pytest.mark.parametrize("schedule", LENGTHENED)
def test_a_run_goes_on_for_longer_where_its_schedule_does(tmp_path, schedule):
    reference = run(build(), shuffled(), epochs=4, **LENGTHENED[schedule])
    run(build(), shuffled(), tmp_path, epochs=2, **LENGTHENED[schedule])
    longer = run(build(), shuffled(), tmp_path, resume=True, epochs=4, **LENGTHENED[schedule])
    assert metrics(longer.history) == metrics(reference.history)
    assert len({entry["learning_rate"] for entry in longer.history.steps}) > 1
    assert_same(weights(longer.model), weights(reference.model))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"schedule": "linear"}, "step 2 had the learning rate 0.015, and would have had 0.0175"),
        ({"schedule": "cosine"}, "step 1|step 2"),
        ({"scheduler": SCHEDULERS["one cycle"]}, "step 1|step 2"),
        (
            {"scheduler": lambda o, n: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=5)},
            "it ends at step 6: Tried to step",
        ),
        ({"scheduler": lambda o, n: lr_scheduler.PolynomialLR(o, 4)}, "its learning rate is 0 from step 5 on"),
    ],
)
def test_a_schedule_that_cannot_go_on_says_so_and_what_to_do(tmp_path, arguments, why):
    run(build(), listed(), tmp_path, epochs=2, **arguments)
    model = build()
    before = weights(model)
    expected = rf"of a run of 4 steps, and the learning rates of .* do not go on to 8: ({why}).*load the adapter"
    with pytest.raises(CheckpointError, match=expected):
        trainer_of(model, tmp_path, epochs=4, **arguments).train(listed(), resume=True)
    assert_same(weights(model), before)
    run(build(), listed(), tmp_path, resume=True, epochs=2, **arguments)


def test_norms_of_gradients_are_kept_and_resumed(tmp_path):
    whole = run(build(), shuffled(), gradient_norms=True)
    names = [name for name, p in whole.model.named_parameters() if p.requires_grad]
    assert list(whole.history.gradient_norms) == names
    assert {len(norms) for norms in whole.history.gradient_norms.values()} == {6}
    squares = [sum(norms[step] ** 2 for norms in whole.history.gradient_norms.values()) for step in range(6)]
    assert [s**0.5 for s in squares] == pytest.approx([entry["grad_norm"] for entry in whole.history.steps], rel=1e-5)
    run(build(), shuffled(), tmp_path, stop=3, checkpoint_every=1, gradient_norms=True)
    resumed = run(build(), shuffled(), tmp_path, resume=True, gradient_norms=True)
    assert resumed.history.gradient_norms == whole.history.gradient_norms
    assert run(build(), shuffled()).history.gradient_norms == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
@pytest.mark.parametrize("file", [0, 1, "adapter", "rename"])
def test_a_crash_while_writing_leaves_the_last_checkpoint_and_no_rest(tmp_path, monkeypatch, error, file):
    reference = run(build(), shuffled())
    first = run(build(), shuffled(), tmp_path, stop=3, checkpoint_every=2)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert first.step == 3
    calls = []
    model = build()
    with monkeypatch.context() as patch:
        if file == "adapter":

            def save(path, **_):
                (path / "adapter_model.safetensors").write_bytes(b"half")
                raise error

            patch.setattr(model, "save_pretrained", save)
        elif file == "rename":
            patch.setattr(atomic.Path, "replace", lambda *_: (_ for _ in ()).throw(_raised(error)))  # type: ignore[attr-defined]
        else:
            real = safetensors.torch.save_file

            def save_file(tensors, path):
                calls.append(path)
                if len(calls) == file + 1:
                    path.write_bytes(b"half")
                    raise error
                real(tensors, path)

            patch.setattr(safetensors.torch, "save_file", save_file)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError) as caught:
            trainer_of(model, tmp_path, checkpoint_every=2).train(shuffled(), resume=True)
        if error is not KeyboardInterrupt:
            assert "checkpoint-4" in str(caught.value)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    resumed = run(build(), shuffled(), tmp_path, resume=True, seed=99, checkpoint_every=2)
    assert metrics(resumed.history) == metrics(reference.history)


def _raised(error):
    return error() if isinstance(error, type) else error


def test_what_a_killed_process_left_behind_is_removed(tmp_path):
    left = tmp_path / ".draft-checkpoint-2-0123abcd"
    for resume in (False, True):
        left.mkdir()
        (left / "trainable.safetensors").write_bytes(b"half")
        run(build(), listed(), tmp_path, resume=resume, epochs=1 + resume)
        assert not left.exists()


def test_a_checkpoint_is_tensors_and_json_and_a_usable_adapter(tmp_path):
    trainer = run(build(), listed(), tmp_path, epochs=1)
    (path,) = list_checkpoints(tmp_path)
    assert {p.name for p in path.iterdir()} == {"trainable.safetensors", "state.safetensors", "state.json", "adapter"}
    assert path.stat().st_mode & 0o077 == 0
    stored = safetensors.torch.load_file(path / "trainable.safetensors")
    assert {n for n in stored if "lora" not in n} == {
        f"base_model.model.norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    }
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), path / "adapter")
    for name, value in weights(loaded).items():
        if "lora" in name:
            assert torch.equal(value, stored[name]), name
            assert torch.equal(value, weights(trainer.model)[name]), name
    json.loads((path / "state.json").read_text(), parse_constant=pytest.fail)


def test_a_fresh_run_never_mixes_with_an_old_one(tmp_path):
    run(build(), listed(), tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="resume=True"):
        trainer_of(build(), tmp_path).train(listed())
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trainer_of(build(), tmp_path / "empty").train(listed(), resume=True)
    with pytest.raises(CheckpointError, match="checkpoint_dir"):
        trainer_of(build()).train(listed(), resume=True)


def damage_json(change):
    def damage(path):
        document = json.loads((path / "state.json").read_text())
        change(document)
        (path / "state.json").write_text(json.dumps(document))

    return damage


DAMAGE = {
    "no state.json": ("state.json", lambda p: (p / "state.json").unlink()),
    "half a state.json": ("state.json", lambda p: (p / "state.json").write_text((p / "state.json").read_text()[:900])),
    "a list": ("state.json", lambda p: (p / "state.json").write_text("[]")),
    "not text": ("state.json", lambda p: (p / "state.json").write_bytes(b"\xff\xfe\x00")),
    "other format": ("state.json", damage_json(lambda d: d.update(format=2))),
    "no step": ("state.json", damage_json(lambda d: d.pop("step"))),
    "other step": ("state.json", damage_json(lambda d: d.update(step=3))),
    "no position": ("state.json", damage_json(lambda d: d["state"].pop("position"))),
    "bad position": ("state.json", damage_json(lambda d: d["state"]["position"].update(consumed=-1))),
    "bad rng": ("state.json", damage_json(lambda d: d["state"]["position"]["now"]["process"].update(python=[1]))),
    "bad torch rng": ("state.json", damage_json(lambda d: d["state"]["position"]["now"]["process"].update(torch=1))),
    "bad history": ("state.json", damage_json(lambda d: d["state"]["history"].update(steps=["x", "y"]))),
    "bad optimizer": ("state.json", damage_json(lambda d: d["state"]["optimizer"].pop("param_groups"))),
    "bad optimizer state": (
        "state.json",
        damage_json(lambda d: d["state"]["optimizer"]["state"]["$dict"].append([99, {}])),
    ),
    "unknown mark": ("state.json", damage_json(lambda d: d["state"].update(position={"$pickle": "x"}))),
    "lost tensor": ("state.json", damage_json(lambda d: d["state"].update(position={"$tensor": "x"}))),
    "flipped bit": ("trainable.safetensors", lambda p: _flip(p / "trainable.safetensors")),
    "truncated": (
        "state.safetensors",
        lambda p: (p / "state.safetensors").write_bytes((p / "state.safetensors").read_bytes()[:-1]),
    ),
    "lost file": ("trainable.safetensors", lambda p: (p / "trainable.safetensors").unlink()),
}


def _flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def full_state(trainer):
    return (
        weights(trainer.model),
        trainer.optimizer.state_dict(),
        trainer.step,
        trainer.history,
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


def assert_refused(directory, data, message, model=None, **kwargs):
    """Resuming fails with ``message`` and changes nothing at all."""
    seed_everything(4)
    trainer = trainer_of(model or build(), directory, **kwargs)
    before = full_state(trainer)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(data, resume=True)
    after = full_state(trainer)
    assert_same(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of six steps stopped after three, in the middle of the second epoch."""
    directory = tmp_path_factory.mktemp("interrupted")
    run(build(), shuffled(Noisy(noise=0.0)), directory, stop=4, checkpoint_every=3)
    return directory


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints_are_refused_by_name(tmp_path, interrupted, kind):
    shutil.copytree(interrupted, tmp_path / "c")
    file, damage = DAMAGE[kind]
    damage(tmp_path / "c" / "checkpoint-3")
    if kind == "other step":  # consistent otherwise: taken for what it says it is
        document = json.loads((tmp_path / "c" / "checkpoint-3" / "state.json").read_text())
        document["step"] = 5
        (tmp_path / "c" / "checkpoint-3" / "state.json").write_text(json.dumps(document))
    assert_refused(tmp_path / "c", shuffled(Noisy(noise=0.0)), rf"checkpoint-3/{file}.*Move .*checkpoint-3 away")


def test_checkpoints_of_another_run_are_refused(interrupted):
    data = shuffled(Noisy(noise=0.0))
    assert_refused(interrupted, data, "accumulation was 4 and is 2", accumulation=2)
    assert_refused(interrupted, data, "learning_rate was 0.02 and is 0.1", learning_rate=0.1)
    assert_refused(interrupted, data, "max_grad_norm", max_grad_norm=None)
    assert_refused(interrupted, data, "optimizer was 'AdamW' and is 'SGD'", optimizer=torch.optim.SGD)
    assert_refused(interrupted, data, r"trainable.safetensors does not fit.*lora_", model=build(rank=3))
    assert_refused(interrupted, shuffled(Noisy(count=30)), "batches per epoch was 6 and is 15")
    assert_refused(interrupted, shuffled(Noisy(seed=2, noise=0.0)), "batch 4 of epoch 2")
    assert_refused(interrupted, shuffled(generator=torch.Generator()), "random generators of its own")


def test_an_optimizer_over_parameters_in_another_order_is_refused(tmp_path):
    run(build(), listed(), tmp_path, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02), stop=3)
    reordered = {"optimizer": lambda parameters: torch.optim.AdamW(list(reversed(parameters)), lr=0.02)}
    assert_refused(tmp_path, listed(), "does not fit the optimizer", **reordered)


def test_extra_or_frozen_parameters_are_refused(interrupted):
    model = build()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    assert_refused(interrupted, shuffled(Noisy(noise=0.0)), "not trainable", model=model)


def test_state_that_cannot_be_stored_is_refused_before_training(tmp_path):
    class Opaque:
        def __init__(self) -> None:
            self.inner = object()

        def __call__(self, step):
            return 1.0

    model = build()
    before = weights(model)
    trainer = trainer_of(model, tmp_path, scheduler=lambda o, n: lr_scheduler.LambdaLR(o, Opaque()))
    with pytest.raises(CheckpointError, match=r"scheduler/lr_lambdas/0/inner.*object"):
        trainer.train(listed())
    assert_same(weights(model), before)
    trainer_of(build(), scheduler=lambda o, n: lr_scheduler.LambdaLR(o, Opaque())).train(listed())


def test_a_failed_run_keeps_its_checkpoint_and_resumes(tmp_path):
    data = listed()
    spoilt = [*data[:5], (data[5][0], data[5][1] * math.nan)]
    with pytest.raises(NonFiniteLossError):
        run(build(), spoilt, tmp_path, accumulation=1, checkpoint_every=1)
    resumed = run(build(), data, tmp_path, resume=True, seed=99, accumulation=1, checkpoint_every=1)
    assert metrics(resumed.history) == metrics(run(build(), data, accumulation=1).history)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.lists(st.integers(-5, 5), max_size=3).map(lambda n: torch.tensor(n, dtype=torch.int64)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab$/", max_size=3) | st.integers(), inner, max_size=3)
        | st.dictionaries(st.integers(0, 9), st.integers(0, 9), max_size=3).map(collections.Counter)
    ),
    max_leaves=12,
)


def equal(left, right):
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


@given(values)
def test_codec_gives_back_what_it_got(value):
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(codec.encode(value, tensors, "state"), allow_nan=False)
    assert equal(codec.decode(json.loads(text), tensors), value)


def test_codec_keeps_nan_and_refuses_objects():
    assert math.isnan(codec.decode(codec.encode(math.nan, {}, "x"), {}))
    assert codec.encode(np.float32(0.5), {}, "x") == 0.5
    with pytest.raises(CheckpointError, match=r"x/a/1 holds a builtins.object"):
        codec.encode({"a": [1, object()]}, {}, "x")
