# %% [markdown]
# # Two roles, and workers of their own
#
# A *provider* has a model that reads handwritten digits. A *data owner* has digits from a scanner that mirrors them, and
# may not show them to anybody. The provider splits the model and serves its layers from two processes; the data owner
# trains from the part that holds none of these weights. On the way one worker is killed.
#
# **You learn** how to split a model, make keys, start `ciphertune worker`, train from the client's part with
# `load_client`, what happens when a worker dies, and what a worker sees.
#
# **You need** `pip install "ciphertune[demo,zmq]"`. Nothing is downloaded; everything stays on this machine, at
# addresses that the system picks.

# %%
import atexit
import copy
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import nn

import ciphertune
from ciphertune.bundle.worker import load_worker
from ciphertune.worker import Worker

# %% tags=["parameters"]
STEPS = 60  # of each fine-tuning
BATCH = 32  # images a step
KILL_AT = 30  # the step before which a worker is killed


# %% [markdown]
# ## The provider
# An ordinary network, trained in the clear on upright digits.


# %%
def network():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def fit(model, x, y, steps, rate, before_step=lambda step: None):
    pick = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    losses = []
    for step in range(steps):
        before_step(step)
        rows = torch.randint(len(x), (BATCH,), generator=pick)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def accuracy(model, x, y):
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
torch.manual_seed(0)
original = network()
fit(original, images[:800], labels[:800], 400, 3e-3)
original.eval().requires_grad_(False)

# %% [markdown]
# `split` writes two folders: one for data owners, one for workers. `layers="all"` includes the last layer, the output
# head, which stays at the client otherwise. `ciphertune split` does this for models of transformers from the command line.

# %%
ciphertune.split(original, "bundle", layers="all")
for file in sorted(path for path in Path("bundle").rglob("*") if path.is_file()):
    print(f"{file.stat().st_size:8,} bytes  {file}")


# %% [markdown]
# Keys with which workers and clients recognise each other, then two workers with the same layers. In earnest each role
# makes its own keys and they exchange public ones: see [workers elsewhere](../remote.md).


# %%
def ciphertune_command(*arguments):
    return [sys.executable, "-m", "ciphertune", *arguments]


def start_worker(name):
    command = ciphertune_command("worker", "bundle/worker", "--bind", "tcp://127.0.0.1:0", "--curve", "keys")
    with Path(f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--threads", "1", "--log-format", "json"], stdout=subprocess.PIPE, stderr=log, text=True
        )
    atexit.register(process.kill)  # none is left behind if this page stops half way
    ready = process.stdout.readline()  # "ready HOST:PORT" once it takes requests; empty if it could not start
    if not ready.startswith("ready "):
        raise RuntimeError(Path(f"{name}.log").read_text())
    return process, ready.split()[1].removeprefix("tcp://")


subprocess.run(ciphertune_command("keys", "keys"), check=True, capture_output=True)
first, first_address = start_worker("first")
second, second_address = start_worker("second")

# %% [markdown]
# ## The data owner
# Has `bundle/client`, the keys of a client, and mirrored digits. `load_client` builds the model around layers that are
# elsewhere. This network is not one of transformers', so its modules are given, without weights.

# %%
x = images.view(-1, 8, 8).flip(2).reshape(-1, 64)
train_x, train_y, test_x, test_y = x[800:1400], labels[800:1400], x[1400:], labels[1400:]

with torch.device("meta"):
    skeleton = network()
workers = f"{first_address},{second_address}"
loaded = ciphertune.load_client("bundle/client", to=f"mlwe+zmq://{workers}?curve=keys", skeleton=skeleton)
session = ciphertune.session_of(loaded)
here = sum(p.numel() for p in loaded.parameters())
print(f"{ciphertune.share(loaded).outsourced:,} weights at the workers, {here} parameters here (biases)")


# %%
def adapted(base):
    torch.manual_seed(3)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2", "4"]))


model = adapted(loaded)
accuracy_before = accuracy(model, test_x, test_y)


def kill_one(step):
    if step == KILL_AT:
        first.kill()
        first.wait()


losses = fit(model, train_x, train_y, STEPS, 1e-2, before_step=kill_one)
accuracy_after = accuracy(model, test_x, test_y)
print(f"mirrored digits: {accuracy_before:.1%} before, {accuracy_after:.1%} after")
print(f"{session.traffic.requests} products, {session.traffic.bytes_up / 1e6:.1f} MB to the workers, "
      f"{session.traffic.bytes_down / 1e6:.1f} MB back")  # fmt: skip

# %% [markdown]
# The worker that was killed is missed nowhere: a product has no effects, so what was under way goes to the other one.
# The same training in the clear, on the original weights, which no data owner has:

# %%
clear = adapted(copy.deepcopy(original))
losses_clear = fit(clear, train_x, train_y, STEPS, 1e-2)

plt.figure(figsize=(6, 3))
plt.plot(losses_clear, label=f"in the clear, {accuracy(clear, test_x, test_y):.1%}", linewidth=2)
plt.plot(losses, ":", label=f"mlwe+zmq, {accuracy_after:.1%}", linewidth=2)
plt.axvline(KILL_AT, color="grey", linewidth=1)
plt.text(KILL_AT, 1.5, " a worker is killed", color="grey")
plt.xlabel("step")
plt.ylabel("loss on mirrored digits")
plt.ylim(bottom=0)
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# The adapter goes to whoever has the original weights, and loads with stock peft:

# %%
model.save_pretrained("adapter")
tuned = PeftModel.from_pretrained(copy.deepcopy(original), "adapter")
print(f"original weights and the adapter: {accuracy(tuned, test_x, test_y):.1%}")

# %% [markdown]
# ## What a worker counts and logs
# `ciphertune top` asks a worker for its counts; `own` are those of the client that asks. Below them, all that it wrote to its log.

# %%
top = subprocess.run(
    ciphertune_command("top", f"zmq://{second_address}?curve=keys", "--once", "--json"),
    check=True, capture_output=True, text=True,
)  # fmt: skip
found = json.loads(top.stdout)["workers"][0]
print(json.dumps({"layers": found["layers"], "weight_bytes": found["weight_bytes"], "own": found["own"]}, indent=2))
print(Path("second.log").read_text())


# %% [markdown]
# ## What a worker sees
# To look at requests themselves, the next cell gives the client's part a worker that remembers every message. It stands
# where the wire ends: the keys above protect the wire, only `mlwe` protects from the worker. 256 empty images go in
# first, then 256 times the same digit, then these once more.


# %%
class Curious:
    """A worker that remembers what it was sent."""

    def __init__(self, worker):
        self.worker, self.seen = worker, []

    def handle(self, request, peer=""):
        if request.kind == "evaluate":
            self.seen.append((dict(request.fields), {k: t.clone() for k, t in request.buffers.items()}))
        return self.worker.handle(request, peer)


curious = Curious(Worker(load_worker("bundle/worker")))
with torch.device("meta"):
    skeleton = network()
observed = ciphertune.load_client("bundle/client", to="mlwe", skeleton=skeleton, worker=curious)
digit = test_x[:1]
sent = []
for image in (torch.zeros(1, 64), digit, digit):
    curious.seen.clear()
    with torch.no_grad():
        observed[0](image.expand(256, -1))
    fields, buffers = curious.seen[0]
    sent.append(buffers)
print({name: value for name, value in fields.items() if isinstance(value, (int, str))})
print({name: (str(t.dtype), tuple(t.shape)) for name, t in buffers.items()})


def bytes_of(buffers):
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in buffers.values()])


same = float((bytes_of(sent[1]) == bytes_of(sent[2])).float().mean())
print(f"the same digits twice: {same:.2%} of the bytes are equal; 1 in 256 is {1 / 256:.2%}")

# %%
figure, axes = plt.subplots(2, 2, figsize=(7, 4), width_ratios=[1, 3])
for row, image, buffers, name in zip(axes, (torch.zeros(64), digit[0]), sent[:2], ("empty", "a digit"), strict=True):
    row[0].imshow(image.view(8, 8), cmap="gray_r", vmin=0, vmax=1)
    row[0].set(title=name, xticks=[], yticks=[])
    row[1].hist(bytes_of(buffers), bins=64, range=(0, 256), color="#3182bd")
    row[1].set(title="values of the bytes that the worker gets", yticks=[])
plt.tight_layout()
plt.show()

# %% [markdown]
# Pictures like these show what encryption looks like; they prove nothing. What does is the hardness of the problem behind
# `mlwe`, at the parameters that the session states:

# %%
print(session.security.summary)

# %% [markdown]
# | who | has or learns | does not get |
# | --- | --- | --- |
# | worker | weights (8 bits), names and shapes of layers, rows of a product, direction, times, which client | images, labels, activations, gradients, adapters, secrets of the encryption |
# | data owner | biases, scales and hashes of weights, results of products; codes of weights, once, block by block, which it does not keep | |
# | the wire (CURVE) | sizes and times | everything else |
#
# - **A data owner can work the weights out**: whoever may send any input to a linear layer, and gets its result, finds its
#   matrix with as many inputs as it has columns. Splitting saves memory and keeps honest people honest; it does not keep
#   a model secret.
# - **A worker that lies is not noticed**: it is trusted to compute what it is asked to, not with the data.
#
# [The threat model](../threat-model.md) has the whole list.
#
# ## For the record
# The continuous tests run this page and check these values.

# %% tags=["results"]
ran = second.poll() is None
second.terminate()
results = {
    "upright_original": accuracy(original, images[800:], labels[800:]),
    "mirrored_before": accuracy_before,
    "mirrored_original": accuracy(original, test_x, test_y),
    "mirrored_after": accuracy_after,
    "mirrored_after_clear": accuracy(clear, test_x, test_y),
    "mirrored_tuned": accuracy(tuned, test_x, test_y),
    "largest_loss_difference": max(abs(a - b) for a, b in zip(losses, losses_clear, strict=True)),
    "first_killed": first.poll() == -9,
    "second_ran_to_the_end": ran,
    "second_status": second.wait(60),
    "equal_bytes": same,
    "parameters_here": here,
}
print(json.dumps(results, indent=2))
session.close()
ciphertune.session_of(observed).close()
