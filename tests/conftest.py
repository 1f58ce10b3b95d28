"""Strict switches for the whole suite, and what tests share."""

import gc
import os
import pathlib

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config):
    """Compiles the default tier without LLVM's expensive passes.

    They take a quarter of the time of some thousand small programs that run once. The
    slow tier compiles as users do.
    """
    if "not slow" in (config.option.markexpr or ""):
        jax.config.update("jax_disable_most_optimizations", True)


# Programs that wrote the golden files; they need mpmath, which no test does.
collect_ignore_glob = ["*_golden.py"]

ROOT = pathlib.Path(__file__).parent.parent
if jax.config.jax_compilation_cache_dir is None:
    # Many processes, of this run and the next, compile the same small functions.
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
DATA = pathlib.Path(os.environ.get("SNNK_DATA_DIR", ROOT.parent / "shared" / "data"))


def data_folder(name: str) -> pathlib.Path:
    """The folder of a real data set; skips the test where it is absent."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"data set {name} is not in {DATA.name}; set SNNK_DATA_DIR")
    return folder


@pytest.fixture
def root() -> pathlib.Path:
    return ROOT


@pytest.fixture
def data_dir():
    return data_folder


@pytest.fixture
def unchecked():
    """Without jaxtyping's checks: the library's own errors, as users see them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def room_for_compiled_code():
    """Every program that JAX keeps takes memory maps, of which Linux allows 65530.

    A process beyond that dies in its next compilation; a worker of the slow tier did.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def mesh():
    from experiments.sharding import make_mesh

    return make_mesh((("data", -1),))
