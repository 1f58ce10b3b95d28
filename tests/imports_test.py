"""Imports point one way, and importing the library is cheap."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# What each part of snnk_jax may import of the others; see the design's layout.
CORE = {
    "typing": set(),
    "_files": set(),
    "_arguments": set(),
    "testing": {"typing"},
    "activations": {"typing"},
    "projections": {"typing"},
    "kernels": {"typing", "activations"},
    "_samples": {"typing", "kernels"},
    "features": {"typing", "activations", "projections", "kernels", "_arguments"},
    "ops": {"typing", "kernels", "features"},
    "calibration": {
        *("typing", "activations", "kernels", "features", "ops", "ridge", "_samples"),
    },
    "diagnostics": {
        *("typing", "activations", "kernels", "features", "ops", "calibration"),
        "_samples",
    },
    "bundling": {"typing", "kernels", "features", "ops", "calibration"},
    "ridge": {"typing", "activations"},
    "infinite": {"typing", "activations", "projections", "ridge", "_arguments"},
}
FLAX = {
    "nn": {
        *("typing", "activations", "projections", "features", "ops"),
        *("calibration", "diagnostics", "bundling", "surgery", "_samples"),
        "_arguments",
    },
    "surgery": {"typing", "_arguments"},
    "models": {"typing", "_files", "_arguments"},
    "adapters": {
        *("typing", "_files", "activations", "projections", "features", "nn"),
        *("surgery", "_arguments"),
    },
    "compression": {
        *("typing", "activations", "kernels", "features", "ops", "calibration"),
        *("diagnostics", "ridge", "nn", "surgery", "models", "adapters", "_files"),
        "projections",
    },
    "estimators": {
        *("typing", "activations", "features", "ops", "bundling", "infinite", "ridge"),
    },
}
ALLOWED = CORE | FLAX
SCIPY = ("projections", "ridge", "infinite")  # Sobol points, LAPACK
PACKAGES = {"jax", "numpy", "jaxtyping", "safetensors", *sys.stdlib_module_names}
FORBIDDEN = ("jax.core", "jax.interpreters", "jax.lib", "jax._src", "jaxlib")


def imported(source):
    """Dotted names that a source file imports, those of ``from a import b`` as a.b.

    Relative ones keep their dots, so that no rule allows them.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def attributes(source):
    """Dotted attribute chains in a source file, ``jax.pmap`` for instance."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            parts = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name):
                yield ".".join([node.id, *reversed(parts)])


def within(name, module):
    return name == module or name.startswith(module + ".")


def wrong_edges(part, source):
    """Imports in a file of ``snnk_jax.<part>`` that the layout does not allow."""
    packages = PACKAGES | ({"flax"} if part in FLAX else set())
    packages |= {"sklearn"} if part == "estimators" else set()
    packages |= {"scipy"} if part in SCIPY else set()
    packages |= {"tokenizers"} if part == "models" else set()
    wrong = set()
    for name in imported(source):
        top, *rest = name.split(".")
        if top == "snnk_jax":
            target = rest[0] if rest else ""
            if target not in {part, *ALLOWED[part]}:
                wrong.add(name)
        elif top not in packages:
            wrong.add(name)
    return wrong


def wrong_names(source):
    """Uses of private or removed corners of JAX, and of pmap."""
    names = {*imported(source), *attributes(source)}
    return {
        name
        for name in names
        if any(within(name, module) for module in FORBIDDEN)
        or "pmap" in name.split(".")
    }


def library_files():
    files = sorted((ROOT / "snnk_jax").rglob("*.py"))
    return [f for f in files if f != ROOT / "snnk_jax" / "__init__.py"]


def label(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", library_files(), ids=label)
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT / "snnk_jax").parts[0].removesuffix(".py")
    assert part in ALLOWED, f"say in ALLOWED what {part} may import"
    assert not wrong_edges(part, path.read_text())


def test_the_table_has_no_cycle():
    order = []
    while len(order) < len(ALLOWED):
        ready = [p for p in ALLOWED if p not in order and ALLOWED[p] <= set(order)]
        assert ready, f"a cycle among {set(ALLOWED) - set(order)}"
        order += ready
    assert all(ALLOWED[part] <= set(CORE) for part in CORE)


def test_the_package_imports_only_itself():
    source = (ROOT / "snnk_jax" / "__init__.py").read_text()
    assert {name.split(".")[0] for name in imported(source)} == {"snnk_jax"}


@pytest.mark.parametrize(
    "path",
    [*library_files(), *sorted((ROOT / "experiments").rglob("*.py"))],
    ids=label,
)
def test_no_private_jax(path):
    assert not wrong_names(path.read_text())


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("kernels", "from snnk_jax import features"),
        ("kernels", "from snnk_jax.features._base import FeatureMap"),
        ("kernels", "from . import features"),
        ("kernels", "import snnk_jax"),
        ("features", "def f():\n  from flax import nnx"),
        ("features", "import flax.nnx as nnx"),
        ("surgery", "from snnk_jax.nn import SNNKDense"),
        ("models", "import experiments.train"),
        ("nn", "from configs import vit_adapter"),
        ("nn", "import optax"),
        ("ridge", "import sklearn"),
    ],
)
def test_wrong_edges_are_found(part, source):
    assert wrong_edges(part, source)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("features", "from snnk_jax import kernels, projections"),
        ("features", "from snnk_jax.features._base import FeatureMap"),
        ("nn", "from flax import nnx\nimport math"),
        ("estimators", "import sklearn.base"),
    ],
)
def test_right_edges_pass(part, source):
    assert not wrong_edges(part, source)


@pytest.mark.parametrize(
    "source",
    [
        "import jax.core",
        "from jax import core",
        "from jax.interpreters import mlir",
        "import jax\njax.lib.xla_bridge.get_backend()",
        "import jax\nstep = jax.pmap(len)",
        "from jax import pmap",
        "from jax._src import xla_bridge",
    ],
)
def test_private_jax_is_found(source):
    assert wrong_names(source)


def test_import_starts_no_backend_and_loads_nothing_optional():
    code = """
import sys
import flax.nnx, jax  # flax itself loads optax
def loaded():
    return {name.split(".")[0] for name in sys.modules}
before = loaded()
import snnk_jax, snnk_jax.testing
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a backend was started"
optional = {"grain", "matplotlib", "optax", "orbax", "sklearn", "tensorflow",
            "tokenizers",
            "tensorflow_datasets", "torch"}
print(sorted(optional & (loaded() - before)))
jax.numpy.zeros(1)
assert xla_bridge.backends_are_initialized()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
