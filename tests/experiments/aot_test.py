"""The ahead-of-time report: its parsers, and real compiles for a v5e slice."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from flax import nnx

from experiments import aot, load_config
from snnk_jax.models.vit import ViT, ViTConfig
from snnk_jax.models.vit_params import read_config, save_vit

# Cut from what libtpu 0.0.42.1 writes for a sharded MLP on v5e:2x4.
HLO = """\
%fused_computation.1 (param_0.80: bf16[1024,1024]) -> bf16[4096,1024] {
  %all-gather.17 = bf16[4096,1024]{1,0:T(8,128)(2,1)} all-gather(%param_0.80), \
channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %custom-call.1 = (bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) \
custom-call(%all-gather.17), custom_call_target="AsyncCollectiveStart"
}
%fused_computation.2 (param_0.83: bf16[1024,1024]) -> bf16[4096,1024] {
  ROOT %all-gather.19 = bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)} \
all-gather(%param_0.83), channel_id=1, dimensions={0}
}
%all-reduce-scatter.1 (input: f32[1024,2048]) -> f32[256,2048] {
  %input = f32[1024,2048]{1,0:T(8,128)} parameter(0)
  %all-reduce.4 = f32[1024,2048]{1,0:T(8,128)} all-reduce(%input), channel_id=6
  ROOT %slice = f32[256,2048]{1,0:T(8,128)} dynamic-slice(%all-reduce.4, %x, %y)
}
ENTRY %main {
  %fusion = f32[256,2048]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %all-reduce = (f32[128,4]{1,0:T(8,128)S(1)}, f32[]{:T(128)}) \
all-reduce(%b, %c), channel_id=2, to_apply=%add.clone
  %collective-permute-start = (f32[24,8]{1,0:T(8,128)}, f32[24,8]{1,0:T(8,128)}, \
u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%slice), channel_id=1
  %collective-permute-done = f32[24,8]{1,0} \
collective-permute-done(%collective-permute-start)
  %all-to-all = pred[4,128]{1,0} all-to-all(%d), channel_id=4, dimensions={0}
  ROOT %add = f32[] add(%all-reduce, %all-to-all)
}
"""


def test_count_collectives():
    found = aot.count_collectives(HLO)
    assert found == {
        "all-reduce": {"count": 1, "bytes": (128 * 4 + 1) * 4},
        "all-gather": {"count": 1, "bytes": 4096 * 1024 * 2},
        "reduce-scatter": {"count": 1, "bytes": 256 * 2048 * 4},
        "all-to-all": {"count": 1, "bytes": 4 * 128},
        "collective-permute": {"count": 1, "bytes": 24 * 8 * 4},
    }


def test_collectives_without_channels_all_count():
    line = "  %r.{} = f32[8]{{0}} all-reduce(%x), replica_groups={{}}, to_apply=%add\n"
    found = aot.count_collectives(line.format(0) + line.format(1))
    assert found["all-reduce"] == {"count": 2, "bytes": 64}


@pytest.mark.parametrize(
    "error",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (72.31G) exceeds available HBM (15.75G).\nAllocations: ...",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
        "memory space HBM. Used 72.31G of 15.75G HBM. Exceeded by 56.56G.",
    ],
)
def test_out_of_memory_message(error):
    assert aot.out_of_memory_message(error) == (
        "out of memory: needs 72.31GiB of HBM per device, 15.75GiB available. "
        "Try a smaller optim.batch_size, model.remat or more devices."
    )


def test_unknown_out_of_memory_message_is_one_line():
    message = aot.out_of_memory_message("RESOURCE_EXHAUSTED: new words.\nmore\n")
    assert message == "out of memory: RESOURCE_EXHAUSTED: new words."


def test_missing_libtpu_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "jax\[tpu\]=='):
        aot.get_topology("v5e:2x4")


def test_unknown_data_needs_num_classes():
    config = load_config("configs/vit_pretrain.py", {"data.name": "tfds:unknown"})
    with pytest.raises(ValueError, match=r"num_classes must be given.*tfds:unknown"):
        aot.prepare(config, "v5e:2x4")


def test_stored_weights_give_the_sizes_only(tmp_path):
    sizes = ViTConfig(
        hidden_size=24,
        depth=3,
        num_heads=2,
        mlp_dim=40,
        image_size=8,
        patch_size=2,
        pool="cls",
    )
    path = tmp_path / "vit.safetensors"
    save_vit(path, ViT(sizes, rngs=nnx.Rngs(0)))
    assert read_config(path) == sizes
    config = load_config("configs/vit_adapter.py", {"model.weights": str(path)})
    model = aot.without_weights(config).model
    assert not model.weights
    assert (model.hidden_size, model.depth, model.num_heads) == (24, 3, 2)
    assert (model.mlp_dim, model.patch_size, model.pool) == (40, 2, "cls")
    assert config.model.weights == str(path)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "jax[tpu]"',
)


@pytest.fixture
def compile_step(root):
    """Runs the command on the tiny config, in a process of its own."""
    env = os.environ | {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # tests may run beside each other
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
    }
    env.pop("XLA_FLAGS", None)

    def run(*arguments: str, recipe: str = "vit_pretrain"):
        config = f"--config=configs/{recipe}.py:quicktest"
        return subprocess.run(
            [sys.executable, "-m", "experiments.aot", config, *arguments],
            cwd=root,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.mark.slow
@needs_libtpu
def test_data_parallel_step_compiles_for_v5e(compile_step, tmp_path):
    done = compile_step("--topology=v5e:2x4", f"--json={tmp_path / 'aot.json'}")
    assert done.returncode == 0, done.stderr
    assert "8 x TPU v5 lite, mesh data 8, global batch 16" in done.stdout
    assert "memory, temporaries" in done.stdout
    summary = json.loads((tmp_path / "aot.json").read_text())
    assert summary["num_devices"] == 8
    (report,) = summary["methods"]
    assert report["method"] == "scratch"
    assert report["flops"] > 0
    assert report["compile_seconds"] > 0
    assert all(size > 0 for size in report["memory_bytes"].values())
    # All gradients, the loss and the accuracy: as float32, at least once.
    assert report["collectives"]["all-reduce"]["count"] >= 1
    params = report["trainable_params"]
    assert report["collectives"]["all-reduce"]["bytes"] >= 4 * params
    assert report["frozen_params"] == 0


@pytest.mark.slow
@needs_libtpu
def test_adapter_step_reduces_only_what_it_trains(compile_step, tmp_path):
    path = tmp_path / "aot.json"
    done = compile_step(
        "--config.methods=snnk_relu,snnk_cos",
        "--config.model.remat=True",
        f"--json={path}",
        recipe="vit_adapter",
    )
    assert done.returncode == 0, done.stderr
    relu, cos = json.loads(path.read_text())["methods"]
    # One block of width 16: two adapters with 16 features each, and the head.
    assert relu["trainable_params"] == 2 * (16 * 16 + 16) + 16 * 10 + 10
    assert cos["trainable_params"] == relu["trainable_params"]
    for report in (relu, cos):
        assert report["frozen_params"] > report["trainable_params"]
        reduced = report["collectives"]["all-reduce"]["bytes"]
        assert reduced == 4 * (report["trainable_params"] + 2)  # loss and accuracy


@pytest.mark.slow
@needs_libtpu
def test_fully_sharded_step_gathers_its_parameters(compile_step, tmp_path):
    path = tmp_path / "aot.json"
    rules = "--config.mesh.rules=(('.*', ('fsdp', 'data')),)"
    done = compile_step(
        rules,
        "--config.model.hidden_size=1024",
        "--config.model.mlp_dim=4096",
        f"--json={path}",
    )
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(path.read_text())["methods"]
    assert report["collectives"]["all-gather"]["count"] > 0
    # Each device holds an eighth of the parameters and of Adam's two moments.
    share = 3 * 4 * report["trainable_params"] / 8
    assert report["memory_bytes"]["arguments"] == pytest.approx(share, rel=0.1)


@pytest.mark.slow
@needs_libtpu
def test_out_of_memory_is_one_line(compile_step, tmp_path):
    path = tmp_path / "aot.json"
    done = compile_step("--config.optim.batch_size=134217728", f"--json={path}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "out of memory" in line]
    assert line.startswith("scratch: out of memory: needs ")
    assert "15.75GiB available" in line
    (report,) = json.loads(path.read_text())["methods"]
    assert f"{report['method']}: {report['error']}" == line


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--topology=v99:2x2", "topology must name a TPU slice"),
        ("--topology=nonsense", "topology must name a TPU slice"),
        ("--config.mesh.axes=(('data', 3),)", "mesh.axes must multiply to the 8"),
        ("--config.optim.batch_size=12", "optim.batch_size must be divisible"),
    ],
)
def test_mistakes_are_one_line(compile_step, argument, message):
    done = compile_step(argument)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
