import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.testing import tolerance


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5), (1, 2, 5)], ids=str)
def test_contract_is_the_product(dtype, batch):
    with jax.enable_x64(dtype == "float64"):
        phi, psi = normal(*batch, 7, dtype=dtype), normal(7, 3, seed=1, dtype=dtype)
        y = snnk.contract(phi, psi)
        assert y.shape == (*batch, 3)
        assert y.dtype == phi.dtype
        expected = np.asarray(phi, np.float64) @ np.asarray(psi, np.float64)
        np.testing.assert_allclose(
            np.asarray(y, np.float64), expected, **tolerance(dtype)
        )


@pytest.mark.parametrize("phi_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("psi_dtype", ["float32", "bfloat16"])
def test_contract_returns_the_dtype_of_phi(phi_dtype, psi_dtype):
    y = snnk.contract(normal(2, 7, dtype=phi_dtype), normal(7, 3, dtype=psi_dtype))
    assert y.dtype == jnp.dtype(phi_dtype)


def products(fn, *args):
    """The dot_general equations of a function, those of compiled parts as well."""

    def find(equations):
        for equation in equations:
            if equation.primitive.name == "dot_general":
                yield equation
            if "jaxpr" in equation.params:
                yield from find(equation.params["jaxpr"].jaxpr.eqns)

    return list(find(jax.make_jaxpr(fn)(*args).jaxpr.eqns))


def test_contract_accumulates_in_float32():
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert float(snnk.contract(ones, ones.T)[0, 0]) == 4096
    (product,) = products(snnk.contract, ones, ones.T)
    assert product.outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_precision_reaches_every_product(precision):
    features = snnk.features.ArcCosine(num_features=8, precision=precision)
    params = features.init(jax.random.key(0), 4)

    def layer(x, kernel):
        return snnk.snnk_dense(features, params, x, kernel)

    found = products(layer, normal(2, 4), normal(4, 3))
    assert len(found) == 3
    wanted = jax.lax.Precision(precision)
    assert {e.params["precision"] for e in found} == {(wanted, wanted)}


def test_dense_keeps_the_dtype_of_its_inputs():
    features = snnk.features.URF(num_features=8)
    params = features.init(jax.random.key(0), 4)
    x = normal(2, 4, dtype="bfloat16")
    y = snnk.snnk_dense(features, params, x, normal(4, 3), normal(3))
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("activation", ["cos", "sin"])
def test_dense_estimates_the_layer(activation):
    features = snnk.features.URF(activation=activation, num_features=2**14, scale=1.0)
    params = features.init(jax.random.key(0), 8)
    x, kernel, bias = 0.2 * normal(5, 8), 0.2 * normal(8, 3, seed=1), normal(3, seed=2)
    y = snnk.snnk_dense(features, params, x, kernel, bias)
    exact = getattr(np, activation)(np.asarray(x @ kernel + bias[None]))
    np.testing.assert_allclose(y, exact, atol=0.1)


@pytest.mark.usefixtures("unchecked")
def test_wrong_shapes_are_refused():
    for phi, psi in [((2, 3), (4, 5)), ((), (1, 2)), ((2, 3), (3,)), ((3,), (2, 3, 4))]:
        with pytest.raises(
            ValueError, match=r"phi must be \[..., m\] and psi \[m, o\]"
        ):
            snnk.contract(jnp.ones(phi), jnp.ones(psi))
    with pytest.raises(ValueError, match="phi must be floating. Got int32"):
        snnk.contract(jnp.ones((2, 3), jnp.int32), jnp.ones((3, 1)))
    features = snnk.features.URF(num_features=8)
    params = features.init(jax.random.key(0), 4)
    with pytest.raises(ValueError, match=r"x must be .* Got \(2, 5\) and \(4, 3\)"):
        snnk.snnk_dense(features, params, jnp.ones((2, 5)), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\). Got \(4,\)"):
        snnk.snnk_dense(
            features, params, jnp.ones((2, 4)), jnp.ones((4, 3)), jnp.ones(4)
        )
