"""Adapter files of models of the size of BERT-base and ViT-B/16, across processes."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROCESS = """
import json, pathlib, sys, time
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import snnk_jax as snnk
from snnk_jax.models.bert import Bert, BertConfig
from snnk_jax.models.vit import ViT, ViTConfig

family, action, folder = sys.argv[1:]
file = pathlib.Path(folder) / "adapter.safetensors"
rng = np.random.default_rng(0)

def values(variable):
    return jnp.asarray(0.03 * rng.standard_normal(variable.shape, np.float32))

def filled(module):
    graphdef, state = nnx.split(module)
    flat = [(p, v.replace(values(v))) for p, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))

def build():
    if family == "bert":
        return Bert(BertConfig.preset("base", num_outputs=3), rngs=nnx.Rngs(0))
    return ViT(ViTConfig.preset("B/16", num_classes=3), rngs=nnx.Rngs(0))

base = filled(nnx.eval_shape(build))
inputs = jnp.arange(24).reshape(2, 12)
if family == "vit":
    inputs = jax.random.normal(jax.random.key(0), (1, 224, 224, 3))

def logits(model):
    graphdef, state = nnx.split(model)
    found = jax.jit(lambda state: nnx.merge(graphdef, state)(inputs))(state)
    return np.asarray(found).tobytes().hex()

if action == "save":
    features = snnk.features.ArcCosine(num_features=16)
    rule = snnk.SwapRule(
        path=r"blocks/\\d+/(attention|mlp)",
        build=lambda module, rngs: snnk.nn.Adapted(
            module, snnk.nn.SNNKAdapter(768, features=features, rngs=rngs)
        ),
    )
    model, _ = snnk.swap_modules(base, [rule], rngs=nnx.Rngs(1))
    chosen = nnx.Any(snnk.nn.AdapterParam, nnx.PathContains("head"))
    graphdef, trained, rest = nnx.split(model, chosen, ...)
    flat = [(p, v.replace(values(v))) for p, v in nnx.to_flat_state(trained)]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat), rest)
    size = snnk.adapters.save_adapter(
        file, model, base_fingerprint=snnk.adapters.fingerprint(base)
    )
    print(json.dumps({"size": size, "logits": logits(model), "base": logits(base)}))
else:
    jax.block_until_ready(nnx.state(base))
    processor, clock = [], []
    for _ in range(5):
        start = time.process_time(), time.perf_counter()
        loaded = snnk.adapters.load_adapter(file, base)
        jax.block_until_ready(nnx.state(loaded))
        processor.append(time.process_time() - start[0])
        clock.append(time.perf_counter() - start[1])
    weight = base.blocks[5].mlp.fc1.kernel
    weight[...] = weight[...].at[100, 200].add(1e-3)
    try:
        snnk.adapters.load_adapter(file, base)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    found = {"logits": logits(loaded), "processor": processor, "clock": clock}
    print(json.dumps(found | {"refusal": refusal}))
"""


def process(root, *arguments):
    ran = subprocess.run(
        [sys.executable, "-c", PROCESS, *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        # Threads of BLAS that wait for each other would count as processor time.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_an_adapter_of_m_16_in_another_process(family, tmp_path, root):
    saved = process(root, family, "save", str(tmp_path))
    assert saved["size"] < 1.5e6
    assert saved["logits"] != saved["base"]
    loaded = process(root, family, "load", str(tmp_path))
    assert loaded["logits"] == saved["logits"]
    assert "base_model must be the one the adapter was trained on" in loaded["refusal"]
    # Of the processor, since others may be at the machine; the first one compiles.
    print(family, saved["size"], loaded["processor"], loaded["clock"])
    assert min(loaded["processor"]) < 1
