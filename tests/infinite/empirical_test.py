"""Kernels of finite networks, and their limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from tests.tiers import slow_but

infinite = snnk.infinite
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)


def apply(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"] + params["bias"][None]


def draw(key):
    a, b, c = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(a, (4, 5)),
        "second": jax.random.normal(b, (5, 2)),
        "bias": jax.random.normal(c, (2,)),
    }


@pytest.mark.parametrize("batch_size", slow_but((2,), (1, 2, 64)))
def test_products_are_those_of_the_jacobian(batch_size):
    params = draw(jax.random.key(1))
    other = X[:2] + 1
    left, right = (jax.tree.leaves(jax.jacobian(apply)(params, x)) for x in (X, other))
    expected = sum(
        jnp.einsum("ikp,jlp->ijkl", a.reshape(3, 2, -1), b.reshape(2, 2, -1))
        for a, b in zip(left, right, strict=True)
    )
    value = infinite.empirical(
        apply, params, X, other, full=True, batch_size=batch_size
    )
    np.testing.assert_allclose(value.ntk, expected, rtol=1e-5, atol=1e-5)
    outputs = apply(params, X), apply(params, other)
    product = jnp.einsum("ik,jl->ijkl", *outputs)
    np.testing.assert_allclose(value.nngp, product, rtol=1e-5, atol=1e-6)
    mean = infinite.empirical(apply, params, X, other, batch_size=batch_size)
    for part, whole in zip(mean, value, strict=True):
        trace = jnp.einsum("ijkk->ij", whole) / 2
        np.testing.assert_allclose(part, trace, rtol=1e-5, atol=1e-5)


def test_a_flax_model():
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 1, rngs=nnx.Rngs(1))
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def pure(params, x):
        return nnx.merge(graph, params, rest)(x)

    value = infinite.empirical(pure, params, X, get="ntk")
    np.testing.assert_allclose(value, value.T, rtol=1e-5)
    assert np.linalg.eigvalsh(value).min() > 0


IMAGE = (4, 4, 2)
NETWORKS = {
    "dense": (
        (6,),
        infinite.serial(
            infinite.Dense(1.3, 0.2),
            infinite.Activation("gelu"),
            infinite.Dense(1.1, 0.3),
            infinite.Activation("relu"),
            infinite.Dense(0.9, 0.1),
        ),
    ),
    "residual": (
        (6,),
        infinite.serial(
            infinite.Dense(1.2, 0.1),
            infinite.Residual(
                infinite.serial(
                    infinite.LayerNorm(),
                    infinite.Activation("erf"),
                    infinite.Dense(1.5, 0.2),
                )
            ),
            infinite.Activation("relu"),
            infinite.Dense(),
        ),
    ),
    "branches": (
        (6,),
        infinite.serial(
            infinite.Dense(1.2, 0.1),
            infinite.Activation("relu"),
            infinite.FanOut(2),
            infinite.parallel(
                infinite.serial(infinite.Dense(1.0), infinite.Activation("sin")),
                infinite.Dense(0.7, 0.5),
            ),
            infinite.FanInSum(),
            infinite.Dense(),
        ),
    ),
    "first branches": (
        (3,),
        infinite.serial(
            infinite.FanOut(2),
            infinite.parallel(infinite.Dense(), infinite.Dense()),
            infinite.FanInSum(),
            infinite.Activation("relu"),
            infinite.Dense(),
            infinite.Activation("relu"),
            infinite.Dense(),
        ),
    ),
    "pools": (
        IMAGE,
        infinite.serial(
            infinite.Conv((3, 3), None, "SAME", 1.4, 0.1),
            infinite.Activation("relu"),
            infinite.AvgPool((2, 2), (1, 1), "SAME"),
            infinite.Conv((2, 3), (2, 1), "CIRCULAR", 1.4, 0.1),
            infinite.LayerNorm(),
            infinite.Activation("relu"),
            infinite.GlobalAvgPool(),
            infinite.Dense(1.0, 0.2),
        ),
    ),
    "flat": (
        IMAGE,
        infinite.serial(
            infinite.Conv((3, 3), (2, 2), "SAME", 1.4, 0.1),
            infinite.Activation("gelu"),
            infinite.Conv((2, 2), None, "VALID", 1.4, 0.1),
            infinite.Activation("abs"),
            infinite.Flatten(),
            infinite.Dense(1.0, 0.2),
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_wide_networks_have_the_exact_kernels_in_the_mean(name):
    """Within five standard errors and a bias of order 1 / width."""
    shape, net = NETWORKS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, *shape))
    x[2] = x[0] + 0.3 * x[1]
    x = jnp.asarray(x, jnp.float32)
    exact = net.kernel(x)
    width, draws = (512, 60) if len(shape) == 1 else (128, 60)
    init, run = infinite.finite(net, width=width, num_outputs=16)

    @jax.jit
    def one(key):
        return infinite.empirical(run, init(key, shape), x)

    keys = jax.random.split(jax.random.key(0), draws)
    kernels = [one(key) for key in keys]
    for part in ("nngp", "ntk"):
        values = np.stack([getattr(k, part) for k in kernels])
        error = np.abs(values.mean(0) - getattr(exact, part))
        scale = np.sqrt(np.outer(*[np.diag(getattr(exact, part))] * 2))
        allowed = 5 * values.std(0) / np.sqrt(draws) + 4 * scale / width
        assert (error < allowed).all(), (part, (error / scale).max())


def test_only_what_is_added_to_units_of_another_width_has_theirs():
    dense, act = infinite.Dense(), infinite.Activation("relu")
    bottleneck = infinite.serial(dense, act, dense)

    def sizes(*layers):
        net = infinite.serial(*layers, act, dense)
        init, run = infinite.finite(net, width=64, num_outputs=2)
        params = init(jax.random.key(0), (3,))
        assert run(params, jnp.ones((5, 3))).shape == (5, 2)
        kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
        return [kernel.shape for kernel in kernels]

    def added(*branches):
        sum_ = infinite.FanInSum()
        return infinite.FanOut(2), infinite.parallel(*branches), sum_

    assert sizes(*added(dense, dense)) == [(3, 64), (3, 64), (64, 2)]
    wide = [(3, 64), (64, 64)]
    assert sizes(*added(dense, bottleneck), dense) == [
        *((3, 64), *wide),
        *((64, 64), (64, 2)),
    ]
    narrow = [(3, 64), (64, 3), (3, 64), (64, 2)]
    keeps = infinite.Identity()
    assert sizes(*added(keeps, bottleneck), dense) == narrow
    assert sizes(*added(bottleneck, keeps), dense) == narrow
    assert sizes(infinite.Residual(bottleneck), dense) == narrow


@pytest.mark.slow
def test_the_spread_falls_with_the_width():
    shape, net = NETWORKS["dense"]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, *shape)), jnp.float32)
    spreads = []
    for width in (32, 512):
        init, run = infinite.finite(net, width=width, num_outputs=1)
        one = jax.jit(
            lambda key, init=init, run=run: infinite.empirical(
                run, init(key, shape), x, get="ntk"
            )
        )
        keys = jax.random.split(jax.random.key(2), 80)
        spreads.append(np.std([one(key)[0, 1] for key in keys]))
    # One over the root of the width: four, within what 80 draws tell.
    assert 2.5 < spreads[0] / spreads[1] < 6.5


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    params = draw(jax.random.key(0))
    with pytest.raises(ValueError, match="get must name nngp, ntk or both. Got 'all'"):
        infinite.empirical(apply, params, X, get="all")
    with pytest.raises(ValueError, match="batch_size must be at least 1. Got 0"):
        infinite.empirical(apply, params, X, batch_size=0)
    with pytest.raises(ValueError, match="params must be floating-point. Got 3"):
        infinite.empirical(apply, {**params, "more": 3}, X)
    for name, inputs in (("x1", (X[:0],)), ("x2", (X, X[:0]))):
        with pytest.raises(ValueError, match=f"{name} must hold inputs. Got shape"):
            infinite.empirical(apply, params, *inputs)
    with pytest.raises(ValueError, match=r"outputs must be \[n, o\]. Got \(3,\)"):
        infinite.empirical(lambda p, x: apply(p, x)[:, 0], params, X)
    net = NETWORKS["dense"][1]
    with pytest.raises(ValueError, match="width and num_outputs must be at least 1"):
        infinite.finite(net, width=0)
    odd = infinite.serial(
        infinite.Dense(), infinite.Activation(infinite.NormalizedExponential())
    )
    with pytest.raises(ValueError, match="must be a function for a finite width"):
        infinite.finite(odd, width=2).init(jax.random.key(0), (3,))
