# %% [markdown]
# # A small network under encryption
#
# A network of three linear layers has learnt to tell two half moons apart. It should now tell two circles apart. The
# original weights stay as they are; LoRA adapters learn the difference. First in *simulation*, which has the errors of
# the encryption and none of its cost, then under encryption.
#
# **You learn** how to outsource a model's linear layers with one call, how to train it with a loop of your own, how to
# switch adapters off and on, and how close encrypted training comes to training in the clear.
#
# **You need** `pip install "ciphertune[demo]"`. Nothing is downloaded.

# %%
import copy
import json

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import make_circles, make_moons
from torch import nn

import ciphertune

# %% tags=["parameters"]
STEPS = 60  # of every fine-tuning below
BATCH = 32  # points a step
GRID = 60  # decision boundaries are drawn from GRID × GRID points


# %% [markdown]
# ## The two tasks


# %%
def samples(make, seed, **shape):
    x, y = make(512, noise=0.05, random_state=seed, **shape)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


moons = samples(make_moons, 0)
moons_held_out = samples(make_moons, 1)
circles = samples(make_circles, 2, factor=0.4)
circles_held_out = samples(make_circles, 3, factor=0.4)

# %% [markdown]
# ## The original network
# An ordinary PyTorch model, trained in the clear. Think of it as somebody's pretrained model.

# %%
torch.manual_seed(0)
original = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
optimizer = torch.optim.AdamW(original.parameters(), lr=1e-2)
for _ in range(200):
    loss = nn.functional.cross_entropy(original(moons[0]), moons[1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
original.requires_grad_(False)


def accuracy(model, data):
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


print(f"moons {accuracy(original, moons_held_out):.1%}, circles {accuracy(original, circles_held_out):.1%}")


# %% [markdown]
# ## LoRA, and a loop of one's own
# `adapted` is stock peft. `train` is an ordinary loop: it does not know where the linear layers are evaluated.


# %%
def adapted():
    torch.manual_seed(1)
    model = copy.deepcopy(original)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2", "4"]))


def train(model):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    losses = []
    for _ in range(STEPS):
        pick = torch.randint(len(circles[0]), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(circles[0][pick]), circles[1][pick])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


clear = adapted()
losses = {"in the clear": train(clear)}

# %% [markdown]
# ## In simulation
# One call puts an outsourced layer in the place of every linear layer. `simulation` rounds weights to 8 bits and adds
# the errors that encryption would add; it encrypts nothing. It is for trying things out.

# %%
simulated = ciphertune.outsource(adapted(), to="simulation")
losses["simulation"] = train(simulated)
print(f"circles: in the clear {accuracy(clear, circles_held_out):.1%}, "
      f"simulation {accuracy(simulated, circles_held_out):.1%}")  # fmt: skip

# %% [markdown]
# ## Under encryption
# Another string, nothing else changes. Every product `x Wᵀ` of the forward pass and `g W` of the backward pass is now
# evaluated on ciphertext.

# %%
model = ciphertune.outsource(adapted(), to="mlwe")
session = ciphertune.session_of(model)
losses["mlwe"] = train(model)

print(session.security.summary)
print(f"{session.traffic.requests} products, {session.traffic.bytes_up / 1e6:.1f} MB to the worker, "
      f"{session.traffic.bytes_down / 1e6:.1f} MB back")  # fmt: skip

# %% [markdown]
# What is where now:
#
# | | |
# | --- | --- |
# | at the worker, in the clear | the original weights, rounded to 8 bits |
# | crosses, encrypted | activations and gradients: inputs and results of linear layers |
# | stays with you | points, labels, biases, activation functions, adapters, loss, optimizer, secrets of the encryption |
#
# Without an address, the worker half of `mlwe` runs in this very process. That shows the cost and the accuracy and
# protects nothing; [two roles](3-two-roles.ipynb) puts it into a process of its own. A worker learns the shapes, the
# number of points in a product, and the times.

# %% [markdown]
# ## The same curve

# %%
plt.figure(figsize=(6, 3))
for (name, values), style in zip(losses.items(), ["-", "--", ":"], strict=True):
    plt.plot(values, style, label=name, linewidth=2)
plt.xlabel("step")
plt.ylabel("loss on circles")
plt.ylim(bottom=0)
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Decision boundaries, and adapters off and on
# peft's `disable_adapter` works as ever: with the adapters off, the outsourced model is the original again. Every
# point of these pictures went through the encryption, but for the one on the left.


# %%
def draw(axes, model, data, title):
    side = torch.linspace(-2, 2.8, GRID)
    x, y = torch.meshgrid(side, side, indexing="xy")
    with torch.no_grad():
        odds = model(torch.stack([x.flatten(), y.flatten()], 1)).softmax(1)[:, 1].view(GRID, GRID)
    axes.contourf(x, y, odds, levels=[0, 0.5, 1], colors=["#9ecae1", "#fdae6b"])
    axes.scatter(*data[0].T, c=data[1], s=4, cmap="coolwarm", edgecolors="none")
    axes.set(title=f"{title}\n{accuracy(model, data):.1%}", xticks=[], yticks=[], xlim=(-2, 2.8), ylim=(-2, 2.4))


figure, axes = plt.subplots(1, 4, figsize=(12, 3.4))
draw(axes[0], original, moons_held_out, "original, moons")
with model.disable_adapter():
    draw(axes[1], model, moons_held_out, "adapters off, moons")
    draw(axes[2], model, circles_held_out, "adapters off, circles")
draw(axes[3], model, circles_held_out, "adapters on, circles")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## The result is an ordinary adapter
# It loads on the original network with stock peft, without CipherTune.

# %%
model.save_pretrained("circles-adapter")
tuned = PeftModel.from_pretrained(copy.deepcopy(original), "circles-adapter")
print(f"original weights and the adapter trained under encryption: {accuracy(tuned, circles_held_out):.1%}")

# %% [markdown]
# ## For the record
# The continuous tests run this page and check these values.

# %% tags=["results"]
with model.disable_adapter():
    moons_off = accuracy(model, moons_held_out)
results = {
    "moons_original": accuracy(original, moons_held_out),
    "moons_adapters_off": moons_off,
    "circles_original": accuracy(original, circles_held_out),
    "circles_clear": accuracy(clear, circles_held_out),
    "circles_simulation": accuracy(simulated, circles_held_out),
    "circles_encrypted": accuracy(model, circles_held_out),
    "circles_tuned": accuracy(tuned, circles_held_out),
    "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["in the clear"], losses["mlwe"], strict=True)),
    "losses_clear": [round(value, 4) for value in losses["in the clear"][::10]],
    "losses_encrypted": [round(value, 4) for value in losses["mlwe"][::10]],
}
print(json.dumps(results, indent=2))
session.close()
