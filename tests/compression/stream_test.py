"""Memory of a long calibration stream."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import jax, jax.numpy as jnp
from flax import nnx
import snnk_jax as snnk

class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(768, 1536, rngs=rngs)
        self.fc2 = nnx.Linear(1536, 768, rngs=rngs)
    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x)))

class Layer(nnx.Module):
    def __init__(self, rngs):
        self.mlp = Mlp(rngs)
    def __call__(self, x):
        return x + self.mlp(x)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def batches():
    for i in range(int(sys.argv[1])):
        yield jax.random.normal(jax.random.key(i), (8, 128, 768))

model = nnx.Sequential(Layer(nnx.Rngs(0)))
x = next(iter(batches()))
jax.block_until_ready(model(x))
before = peak()
rules = [snnk.CompressRule(path="layers/0/mlp")]
small, report = snnk.compress(model, batches, rules, budget=0.25, probes=1)
print(json.dumps({"mib": peak() - before, "r2": report.blocks[0].r2}))
"""


@pytest.mark.slow
def test_memory_beyond_the_model_does_not_grow_with_the_stream():
    found = []
    for num in (8, 48):
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(num)],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(result.stdout.splitlines()[-1])["mib"])
    assert found[1] < 1.2 * found[0] + 100
    assert max(found) < 2048
