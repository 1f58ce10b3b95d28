# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # SNNK adapters for a pretrained Vision Transformer
#
# A small ViT, pretrained on Tiny-ImageNet at 32×32, learns handwritten digits with
# 26 thousand trained numbers. Runs on a TPU, a GPU, or a CPU in about two minutes.

# %%
import importlib.util
import os
import pathlib
import subprocess
import sys

# Where to clone the code from, if it is not installed yet (as on a fresh Colab).
REPOSITORY = os.environ.get("SNNK_REPOSITORY", "")

if importlib.util.find_spec("snnk_jax") is None:
    if not REPOSITORY:
        raise ValueError("REPOSITORY must be the address of a snnk_jax repository.")
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "snnk_jax"], check=True)
    install = [sys.executable, "-m", "pip", "install", "-q", "-e"]
    subprocess.run([*install, "./snnk_jax[experiments]"], check=True)
    sys.path.insert(0, str(pathlib.Path("snnk_jax").resolve()))

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import snnk_jax as snnk

ROOT = pathlib.Path(snnk.__file__).parent.parent
sys.path.insert(0, str(ROOT))
from experiments import data, loading
from experiments.augment import normalise
from snnk_jax.models.vit_params import load_vit

jax.devices()

# %% [markdown]
# ## Data and base model
# The digits ship inside scikit-learn, the ViT inside this repository. Its new head
# starts at zero.

# %%
digits = data.load("digits", image_size=32, val_fraction=0.2)
base = load_vit(ROOT / "assets/vit_tin32.safetensors", num_classes=10)

sample = digits.train.__getitems__(np.arange(8))
figure, axes = plt.subplots(1, 8, figsize=(8, 1.2))
for axis, image, label in zip(axes, sample["image"], sample["label"], strict=True):
    axis.imshow(image)
    axis.set(title=str(label), xticks=[], yticks=[])

# %% [markdown]
# ## Adapters by rules
# Behind every attention and feed-forward block stands a frozen random feature map Φ
# and one trained matrix Ψ: y = x + v ⊙ Φ(x)Ψ. Ψ starts at zero, so the model is
# unchanged at first. `swap_modules` works on a clone and reports what it replaced.

# %%
features = snnk.features.ArcCosine(num_features=16)


def adapt(module, rngs):
    adapter = snnk.nn.SNNKAdapter(128, features=features, rngs=rngs)
    return snnk.nn.Adapted(module, adapter)


rules = [snnk.SwapRule(path=r"blocks/\d+/(attention|mlp)", build=adapt)]
model, report = snnk.swap_modules(base, rules, rngs=nnx.Rngs(0))
images = normalise(jnp.asarray(sample["image"]))
assert (model(images) == base(images)).all()
report.matched

# %% [markdown]
# ## Training
# Plain JAX: split the model once into what learns and what stays, differentiate the
# former.

# %%
trainable = nnx.Any(snnk.nn.AdapterParam, snnk.nn.HEAD)
graphdef, params, frozen = nnx.split(model, trainable, ...)
count = sum(leaf.size for leaf in jax.tree.leaves(params))
print(f"{count:,} trained parameters")

STEPS = 120
optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS), weight_decay=1e-4)


@jax.jit
def step(params, opt_state, batch):
    def loss_fn(params):
        logits = nnx.merge(graphdef, params, frozen)(normalise(batch["image"]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


@jax.jit
def hits(params, batch):
    logits = nnx.merge(graphdef, params, frozen)(normalise(batch["image"]))
    return jnp.sum((jnp.argmax(logits, -1) == batch["label"]) * batch["weight"])


loader = loading.TrainLoader(digits.train, batch_size=64, seed=0)
opt_state = optimizer.init(params)
losses = []
for i in range(STEPS):
    params, opt_state, loss = step(params, opt_state, loader.batch(i))
    losses.append(float(loss))


def accuracy(params, split):
    total = sum(float(hits(params, batch)) for batch in loading.eval_batches(split, 64))
    return total / len(split)


test_accuracy = accuracy(params, digits.test)
print(f"test accuracy {test_accuracy:.1%}")

# %%
plt.figure(figsize=(5, 3))
plt.plot(losses)
plt.xlabel("step")
plt.ylabel("training loss")
plt.grid(alpha=0.3)

# %% [markdown]
# ## Save the adapter, load it back
# The file holds the adapters, the head and the key of the random projections, with a
# fingerprint of the base model. Another base is refused.

# %%
trained = nnx.merge(graphdef, params, frozen)
size = snnk.adapters.save_adapter(
    "digits_adapter.safetensors",
    trained,
    base_fingerprint=snnk.adapters.fingerprint(base),
)
print(f"{size / 1e3:.0f} kB")

loaded = snnk.adapters.load_adapter("digits_adapter.safetensors", base)
assert (loaded(images) == trained(images)).all()

# %%
other = load_vit(ROOT / "assets/vit_tin32.safetensors", num_classes=10)
other.norm.bias[...] = other.norm.bias[...] + 0.1
try:
    snnk.adapters.load_adapter("digits_adapter.safetensors", other)
except ValueError as error:
    print(error)
