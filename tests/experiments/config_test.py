import json
import pathlib
import subprocess
import sys

import pytest

from experiments import load_config
from experiments.config import check, methods_of
from experiments.tasks import METHODS

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_default_and_a_quicktest(name):
    for arg in ("", ":quicktest"):
        config = load_config(f"configs/{name}.py{arg}")
        assert config.is_locked
        assert config.name
    with pytest.raises(ValueError, match="the config argument must be"):
        load_config(f"configs/{name}.py:nonsense")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_states_its_command(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"--config=configs/{name}.py" in text.split('"""')[1]


def test_arguments_of_vit_adapter():
    sweep = load_config("configs/vit_adapter.py:sweep")
    wanted = {
        "linear_probe",
        "houlsby",
        "snnk_relu",
        "snnk_cos",
        "bitfit",
        "lora",
        "pfeiffer",
        "full",
    }
    assert wanted <= set(sweep.methods)
    assert len(sweep.seeds) == 3
    assert len(sweep.sweep.learning_rates) > 1
    assert load_config("configs/vit_adapter.py:cifar100").data.name == "tfds:cifar100"


def test_the_learning_rates_are_those_of_the_committed_sweeps():
    rates = load_config("configs/vit_adapter.py").optim.learning_rates.to_dict()
    found = {}
    for name in ("sweep", "maps"):
        sweep = json.loads((ROOT / "docs" / f"vit_adapter_{name}.json").read_text())
        found |= {row["method"]: row["learning_rate"] for row in sweep["table"]}
    assert rates == found


def test_overrides():
    config = load_config("configs/vit_adapter.py", {"optim.steps": 30, "seeds": (4,)})
    assert config.optim.steps == 30
    assert config.seeds == (4,)


def test_methods_with_commas_as_the_command_line_gives_them():
    config = load_config("configs/vit_adapter.py", {"methods": ("lora,bitfit",)})
    assert methods_of(config) == ("lora", "bitfit")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.step", 3, "config keys must exist.*Did you mean 'steps'"),
        ("optim.steps.x", 3, "config keys must exist"),
        ("optim.steps", "many", "config.optim.steps must be a int. Got 'many'"),
        ("optim.steps", 0, "config.optim.steps must be positive. Got 0"),
        ("optim.warmup_steps", 300, "warmup_steps must be less than optim.steps"),
        ("optim.weight_decay", -1.0, "weight_decay must not be negative. Got -1"),
        ("optim.label_smoothing", 1.0, r"label_smoothing must be in \[0, 1\). Got 1"),
        ("data.augment", "cutmix", "data.augment must be one of none, crop"),
        ("data.val_fraction", 1.5, r"val_fraction must be in \[0, 1\)"),
        ("model.dtype", "float16", "model.dtype must be one of float32, bfloat16"),
        ("model.pool", "max", "model.pool must be one of cls, mean"),
        ("adapter.num_features", -4, "num_features must be positive. Got -4"),
        ("mesh.axes", (("model", -1),), "config.mesh.axes must name an axis 'data'"),
        ("methods", ("snnk_rel",), "Got 'snnk_rel'. Did you mean 'snnk_relu'"),
        ("seeds", (0, -1), "config.seeds must be whole numbers of 0 to 2"),
        ("seeds", (2**32,), "config.seeds must be whole numbers .* Got .4294967296"),
        ("seeds", (0.5,), "config.seeds must be whole numbers of 0 to 2"),
        ("seeds", (3, 1, 3), r"config.seeds must name each one once. Got \(3, 1, 3\)"),
        ("sweep.seed", -1, "config.sweep.seed must be whole numbers of 0 to 2"),
        ("methods", ("full", "full"), "config.methods must name each one once"),
        ("data.name", "cifar", "data.name must be one of digits, .*for a vit. Got 'ci"),
        ("keep_best", True, "eval_split must be 'val' with keep_best: a test split"),
        ("export", "a.safetensors", "export must be empty unless the last of"),
        ("methods", (), "config.methods and config.seeds must not be empty"),
        ("methods", ("scratch",), "learning_rates.scratch must be positive. Got None"),
        ("sweep.learning_rates", (0.1, -1.0), "sweep.learning_rates must be positive"),
        ("sweep.learning_rates", ("1e-3",), "sweep.learning_rates must be positive"),
        ("sweep.learning_rates", (0.1, 0.1), "learning_rates must name each one once"),
    ],
)
def test_bad_values_stop_before_any_work(key, value, message):
    with pytest.raises(ValueError, match=message):
        load_config("configs/vit_adapter.py", {key: value})


def test_a_missing_file():
    with pytest.raises(ValueError, match="a config must be an existing file"):
        load_config("configs/nothing.py")


def test_the_check_touches_no_device():
    code = (
        "from experiments import load_config; load_config('configs/vit_adapter.py');"
        "from jax._src.xla_bridge import backends_are_initialized as started;"
        "assert not started()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_check_accepts_every_method():
    options = {"methods": tuple(METHODS), "model.weights": ""}
    check(load_config("configs/vit_adapter.py:sweep", options))
    with pytest.raises(ValueError, match="weights must be empty for the method 'scr"):
        load_config("configs/vit_adapter.py:sweep", {"methods": ("scratch",)})


@pytest.mark.parametrize(
    ("task", "key", "value", "message"),
    [
        (
            "mrpc",
            "data.name",
            "glue:sst",
            "data.name must be one of glue:sst2, ",
        ),
        ("mrpc", "data.augment", "crop", "data.augment must be 'none' and .* for text"),
        (
            "mrpc",
            "model.patch_dropout",
            0.5,
            "patch_dropout 0 for text. Got 'none'",
        ),
        ("stsb", "optim.label_smoothing", 0.1, "must be 0 for a regression. Got 0.1"),
    ],
)
def test_what_has_no_meaning_for_text_is_refused(task, key, value, message):
    with pytest.raises(ValueError, match=message):
        load_config(f"configs/bert_adapter.py:{task}", {key: value})
