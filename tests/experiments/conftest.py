import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """Optax promotes inside; set for all threads, which a context manager does not."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
