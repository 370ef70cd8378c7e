# %% [markdown]
# # Stock trainers: `transformers.Trainer` and `SFTTrainer`
#
# A ward wants a model that answers its short notes by its own rules: who is called, what is given. The training loops
# are other people's, `transformers.Trainer` and TRL's `SFTTrainer`, as they come. They get an outsourced model and do
# not notice.
#
# **You learn** how to give an outsourced model to both trainers, to evaluate, stop and resume, which settings matter
# and which do not, and what does not work. Both are compared with the same training in the clear.
#
# **You need** `pip install "ciphertune[demo,trl]"` and Python 3.11 or newer. Nothing is downloaded.

# %%
import copy
import itertools
import json
import random

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorForLanguageModeling, PrinterCallback, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import ciphertune
from ciphertune.models.load import load_named_model

# %% tags=["parameters"]
STEPS = 8  # with Trainer
SFT_STEPS = 12  # with SFTTrainer
BATCH = 4  # notes of a step
HELD_OUT = 16  # pairs that are not trained on
RATE = 2e-3  # learning rate at the start; both trainers lower it to nothing
TRIED = 2  # steps with each of the settings at the end

# %% [markdown]
# ## A model and a tokenizer
# SmolLM2, with 135 million weights, from the package that `demo` installs. `AutoModelForCausalLM.from_pretrained(…)`
# and its `AutoTokenizer` do as well. Padding gets a token of its own, or the token that ends an answer would be taken
# for padding.

# %%
base, tokenizer = load_named_model("smollm2")
tokenizer.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
base.eval().requires_grad_(False)


def adapted():
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(base), config)


# %% [markdown]
# ## The private data
# Notes and answers, made up. Beds and days vary and mean nothing; the answer follows from the complaint. Some pairs are
# held out.

# %%
rules = {
    "fever": "paracetamol, tell Ito",
    "cough": "syrup, X-ray",
    "pain": "ibuprofen, ask again",
    "rash": "ointment, tell Brandt",
}
days = ["Monday", "Tuesday", "Thursday", "Friday"]
pairs = [
    {"prompt": f"Bed {bed}: {complaint} since {day}.", "completion": f" {answer}"}
    for bed, day, (complaint, answer) in itertools.product(range(1, 10), days, rules.items())
]
random.Random(0).shuffle(pairs)
held_out, train_pairs = pairs[:HELD_OUT], pairs[HELD_OUT:]
print(f"{len(train_pairs)} pairs to train on, for example {train_pairs[0]}")


# %% [markdown]
# ## `transformers.Trainer`
# The model goes in outsourced, nothing else is special. `Trainer` wants tokens: each note with its answer is one row,
# and the loss is that of all its tokens.
#
# - `use_cpu`: on a machine with a GPU, `Trainer` would move the model there. CipherTune has not been run on one yet.
# - `report_to="none"`: keeps losses out of tracking services. Losses are computed from private data.
# - `PrinterCallback` prints every log line, so it goes, to keep this page short.


# %%
def tokens(pairs):
    return [{"input_ids": tokenizer(p["prompt"] + p["completion"] + tokenizer.eos_token)["input_ids"]} for p in pairs]


settings = {
    "per_device_train_batch_size": BATCH, "learning_rate": RATE,
    "logging_steps": 1, "seed": 5, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def stock_trainer(model, folder):
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder, max_steps=STEPS, eval_strategy="steps", eval_steps=STEPS // 4, save_steps=STEPS // 2, **settings
        ),
        train_dataset=tokens(train_pairs),
        eval_dataset=tokens(held_out),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


clear = stock_trainer(adapted(), "clear")
clear.train()

model = ciphertune.outsource(adapted(), to="mlwe")
session = ciphertune.session_of(model)
trainer = stock_trainer(model, "encrypted")
trainer.train()
traffic = session.traffic
print(session.security.summary)
print(f"{STEPS} steps and 4 evaluations: {traffic.requests} products, {traffic.bytes_up / 1e6:.0f} MB to the worker, "
      f"{traffic.bytes_down / 1e6:.0f} MB back")  # fmt: skip
for name, which in (("in the clear", clear), ("encrypted", trainer)):
    print(f"{name:13} loss on held-out notes after every {STEPS // 4} steps:",
          ", ".join(f"{value:.3f}" for value in logged(which, "eval_loss")))  # fmt: skip

# %% [markdown]
# ## Resume
# Say the machine went down after half of the steps. `Trainer`'s checkpoint holds adapters, optimizer, schedule and the
# state of the random numbers: no weight that is outsourced, and no secret. A new session draws new ones, so the losses
# that follow are those of the first run but for the noise of the encryption.

# %%
session.close()
resumed_model = ciphertune.outsource(adapted(), to="mlwe")
resumed = stock_trainer(resumed_model, "encrypted")
resumed.train(resume_from_checkpoint=f"encrypted/checkpoint-{STEPS // 2}")
ciphertune.session_of(resumed_model).close()
after_resume = max(abs(a - b) for a, b in zip(logged(trainer), logged(resumed), strict=True))
print(f"steps {STEPS // 2 + 1} to {STEPS} once more: no loss differs by more than {after_resume:.1e}")


# %% [markdown]
# ## `SFTTrainer`
# TRL's trainer takes prompts and completions as they are, tokenizes them, adds the token that ends an answer, and
# counts the loss of the completion alone: of the answer, not of beds and days.
#
# Here it adds the adapters itself: the model is outsourced without any, and `peft_config` says which. (A model that
# has adapters already works as well, then without `peft_config`. Both at once is refused by TRL.)
#
# Two defaults are changed, and it matters to know them: `SFTTrainer` turns **gradient checkpointing** and **bf16** on.


# %%
def sft_trainer(model, folder, **changed):
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(folder, **{
            **settings, "max_steps": SFT_STEPS, "max_length": 96, "save_strategy": "no",
            "gradient_checkpointing": False, "bf16": False, **changed,
        }),
        train_dataset=Dataset.from_list(train_pairs),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


sft_clear = sft_trainer(copy.deepcopy(base), "sft-clear")
sft_clear.train()

sft = sft_trainer(ciphertune.outsource(copy.deepcopy(base), to="mlwe"), "sft")
sft_session = ciphertune.session_of(sft.model)
before = sft.evaluate()["eval_loss"]
sft.train()
after, after_clear = sft.evaluate()["eval_loss"], sft_clear.evaluate()["eval_loss"]
print(f"loss on held-out answers: {before:.2f} before, {after:.3f} after; in the clear {after_clear:.3f}")

# %% [markdown]
# ## The same curves

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
for axis, title, plain, encrypted in (
    (axes[0], "Trainer: notes and answers", clear, trainer),
    (axes[1], "SFTTrainer: answers alone", sft_clear, sft),
):
    axis.plot(logged(plain), label="in the clear", linewidth=2)
    axis.plot(logged(encrypted), ":", label="mlwe", linewidth=2)
    axis.set(title=title, xlabel="step", ylim=(0, None))
    axis.legend()
axes[0].set_ylabel("loss")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Stock peft loads the result
# `save_model` writes an ordinary adapter. It goes onto the original model, without CipherTune, and answers held-out
# notes.

# %%
sft.save_model("adapter")
tuned = PeftModel.from_pretrained(copy.deepcopy(base), "adapter").eval()


def answer(model, prompt):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def right(model):
    return sum(answer(model, pair["prompt"]) == pair["completion"] for pair in held_out)


right_before, right_after, right_clear = right(base), right(tuned), right(sft_clear.model.eval())
for pair in held_out[:3]:
    print(f"{pair['prompt']:28}{answer(tuned, pair['prompt'])}")
print(f"right, of {len(held_out)} held-out notes: {right_before} before, {right_after} after, "
      f"{right_clear} when trained in the clear")  # fmt: skip

# %% [markdown]
# ## What settings cost
# Two steps each with one thing changed. Losses are those of the first step, which starts from the same adapters.

# %%
cost = {}
for name, changed in {
    "as above": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "packing": {"packing": True},
}.items():
    tried = sft_trainer(ciphertune.outsource(copy.deepcopy(base), to="mlwe"), "tried", max_steps=TRIED, **changed)
    tried.train()
    counted = ciphertune.session_of(tried.model).traffic
    seen = logged(tried, "num_tokens")[-1]
    cost[name] = {
        "products": counted.requests, "tokens": int(seen), "MB up per 1000 tokens": round(counted.bytes_up / seen / 1e3, 2),
        "first loss": round(logged(tried)[0], 3),
    }  # fmt: skip
    ciphertune.session_of(tried.model).close()
    print(f"{name:23}", ", ".join(f"{value} {what}" for what, value in cost[name].items()))

# %% [markdown]
# | setting | with outsourced layers |
# | --- | --- |
# | `gradient_accumulation_steps`, evaluation, checkpoints, `load_best_model_at_end`, `save_model` | as ever |
# | `gradient_checkpointing` | right, but forward products are sent once more: turn it off unless memory is short |
# | `bf16` | works for the client's part; what is sent stays the same, so it saves no traffic |
# | `packing`, `padding_free` | work, with less padding to encrypt. Packed steps hold more notes, so their loss is another |
# | `completion_only_loss`, `assistant_only_loss` | as ever. Prompts go through the layers too, encrypted, as they must |
# | `peft_config` | for a model without adapters; `target_modules="all-linear"` finds outsourced layers |
# | DoRA, PiSSA, OLoRA | refused: they compute with the original weights |
# | `torch_compile` | works, and compiles only what is between the layers |
# | `layers="all"` and `SFTTrainer` | refused: its loss multiplies by the output head itself, so the head stays here, as it does unless named |
# | `model_init_kwargs` | ignored by TRL for a model that is there already |
# | `activation_offloading` | needs a GPU, so it was not tried |
# | several GPUs (`DataParallel`) | refused |
#
# TRL's `DPOTrainer` was tried for a few steps: with outsourced layers its losses were those of the clear model too.
#
# `Trainer` counts parameters and operations of what it sees; `ciphertune.share(model)` includes what is elsewhere.
# Checkpoints and adapters are private like the data: they stay with you, unless you push them somewhere. Here the worker
# half of `mlwe` runs in this very process, which protects nothing; with workers elsewhere the string is
# `mlwe+zmq://HOST:PORT`: see [two roles](3-two-roles.ipynb).
#
# ## For the record
# The continuous tests run this page and check these values.


# %% tags=["results"]
def differences(one, other):
    return max(abs(a - b) for a, b in zip(logged(one), logged(other), strict=True))


sft_session.close()
results = {
    "steps": len(logged(trainer)),
    "eval_losses": [round(value, 4) for value in logged(trainer, "eval_loss")],
    "eval_losses_clear": [round(value, 4) for value in logged(clear, "eval_loss")],
    "largest_loss_difference": differences(trainer, clear),
    "largest_difference_after_resume": after_resume,
    "sft_losses": [round(value, 4) for value in logged(sft)[:: max(SFT_STEPS // 8, 1)]],
    "sft_largest_loss_difference": differences(sft, sft_clear),
    "sft_before": before,
    "sft_after": after,
    "sft_after_clear": after_clear,
    "held_out": len(held_out),
    "right_before": right_before,
    "right_after": right_after,
    "right_after_clear": right_clear,
    "cost": cost,
}
print(json.dumps(results, indent=2))
