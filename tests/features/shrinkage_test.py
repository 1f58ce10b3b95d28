import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.features import URF, Exponential

WIDTH, FEATURES = 64, 512
NAMES = ("gelu", "silu", "tanh", "sigmoid", "erf", "softplus", "cos")
each_activation = pytest.mark.parametrize("name", NAMES)
SOME = ("gelu", "tanh", "cos")  # smooth, saturating and periodic
rest_slow = pytest.mark.parametrize(
    "name",
    [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)


def make(name, kappa, **fields):
    fields = {"num_features": FEATURES, "shrinkage": True, "scale": 1.0} | fields
    if name == "exp":
        return Exponential(exact_degree=1, kappa=kappa, **fields)
    spectrum = "auto" if name == "cos" else "series"
    return URF(
        activation=name, spectrum=spectrum, exact_degree=1, kappa=kappa, **fields
    )


def unit(num, width, seed):
    x = np.random.default_rng(seed).normal(size=(num, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def layer(kappa, seed=0):
    """Fresh isotropic data, kappa the product of the norms."""
    x = unit(128, WIDTH, 2 * seed) * kappa**0.5
    kernel = unit(64, WIDTH, 2 * seed + 1).T * kappa**0.5
    bias = np.random.default_rng(seed).normal(size=64) / 2
    return (jnp.asarray(a, "float32") for a in (x, kernel, bias))


def affine(features, x, kernel, bias):
    row = features.row
    return row(bias)[None] + row.grad(bias)[None] * (x @ kernel)


def rmse(a, b):
    return np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b)) ** 2))


def random_rows(features, params, kernel, bias):
    """The random part of the readout, [groups, directions, o] cut at the groups."""
    layout = features.layout(kernel.shape[0])
    psi = np.asarray(features.psi(params, kernel, bias), np.float64)
    psi = psi[layout.exact : len(psi) - layout.padding]
    return psi, np.cumsum(layout.counts)[:-1]


@rest_slow
@pytest.mark.parametrize(
    "kappa", [1.0, *(pytest.param(k, marks=pytest.mark.slow) for k in (0.5, 2.0, 4.0))]
)
def test_never_worse_than_the_affine_map(name, kappa):
    features = make(name, kappa)
    for seed in range(2):
        x, kernel, bias = layer(kappa, seed)
        params = features.init(jax.random.key(seed), WIDTH)
        y = snnk.snnk_dense(features, params, x, kernel, bias)
        exact = features.exact(x, kernel, bias)
        error = rmse(y, exact)
        assert error < 1.05 * rmse(affine(features, x, kernel, bias), exact)
        plain = dataclasses.replace(features, shrinkage=False)
        y = snnk.snnk_dense(plain, params, x, kernel, bias)
        assert error < 0.7 * rmse(y, exact)
        if kappa <= 1:
            spread = np.mean(np.var(np.asarray(exact, np.float64), axis=0))
            assert 0.9 < 1 - error**2 / spread < 1


def test_gains_on_the_affine_map_where_the_noise_is_small():
    x, kernel, bias = layer(0.5)
    features = make("cos", 0.5, num_features=4096)
    params = features.init(jax.random.key(0), WIDTH)
    exact = features.exact(x, kernel, bias)
    error = rmse(snnk.snnk_dense(features, params, x, kernel, bias), exact)
    assert error < 0.75 * rmse(affine(features, x, kernel, bias), exact)


@pytest.mark.parametrize("name", ["cos", "gelu", "relu", "exp"])
@pytest.mark.parametrize("kappa", [pytest.param(0.5, marks=pytest.mark.slow), 4.0])
def test_not_worse_on_the_references_than_without_or_affine(name, kappa):
    features = make(name, kappa)
    params = features.init(jax.random.key(0), WIDTH)
    _, kernel, bias = layer(kappa)
    x = params["reference"]
    norms = jnp.linalg.norm(x, axis=1)
    np.testing.assert_allclose(norms, kappa**0.5, rtol=1e-5)
    exact = features.exact(x, kernel, bias)

    def errors(features):
        y = snnk.snnk_dense(features, params, x, kernel, bias)
        return np.mean(np.asarray(y - exact, np.float64) ** 2, axis=0)

    shrunk = errors(features)
    rounding = 1e-9 * np.mean(np.asarray(exact, np.float64) ** 2)
    line = affine(features, x, kernel, bias) - exact
    line = np.mean(np.asarray(line, np.float64) ** 2, axis=0)
    # Each output for itself.
    assert np.all(shrunk <= line * (1 + 1e-4) + rounding)
    plain = errors(dataclasses.replace(features, shrinkage=False))
    assert np.all(shrunk <= plain * (1 + 1e-4) + rounding)


@pytest.mark.parametrize("name", ["cos", "gelu", "tanh", "exp"])
def test_factors_are_one_a_group_and_in_the_unit_interval(name):
    features = make(name, 2.0)
    params = features.init(jax.random.key(0), WIDTH)
    _, kernel, bias = layer(2.0)
    shrunk, edges = random_rows(features, params, kernel, bias)
    plain = dataclasses.replace(features, shrinkage=False)
    whole, _ = random_rows(plain, params, kernel, bias)
    blocks = features.columns_per_direction
    per_block = len(whole) // blocks
    seen = []
    for cut, full in zip(
        np.split(shrunk, blocks), np.split(whole, blocks), strict=True
    ):
        assert len(full) == per_block
        groups = zip(np.split(cut, edges), np.split(full, edges), strict=True)
        for part, rest in groups:
            factors = np.sum(part * rest, axis=0) / np.sum(rest * rest, axis=0)
            np.testing.assert_allclose(part, factors * rest, rtol=1e-3, atol=1e-6)
            assert np.all((factors >= 0) & (factors <= 1 + 1e-5))
            seen.append(factors)
    # Cosine and sine of a group share theirs.
    seen = np.reshape(seen, (blocks, -1, kernel.shape[1]))
    np.testing.assert_allclose(seen, seen[:1].repeat(blocks, 0), rtol=1e-4, atol=1e-5)
    assert 0.01 < seen.max() < 1
    assert seen.std(axis=-1).max() > 1e-3  # each output has its own


def test_exact_rows_are_left_alone():
    features = make("gelu", 1.0)
    params = features.init(jax.random.key(0), WIDTH)
    _, kernel, bias = layer(1.0)
    psi = features.psi(params, kernel, bias)
    plain = dataclasses.replace(features, shrinkage=False)
    whole = plain.psi(params, kernel, bias)
    np.testing.assert_array_equal(psi[: WIDTH + 1], whole[: WIDTH + 1])
    assert not np.allclose(psi[WIDTH + 1 :], whole[WIDTH + 1 :])


@pytest.mark.parametrize("name", ["cos", "exp"])
def test_damping_starts_at_the_cap(name):
    # Columns as without shrinkage up to a half more of |x|^2, damped beyond.
    features = make(name, 1.0)
    params = features.init(jax.random.key(0), WIDTH)
    plain = {k: v for k, v in params.items() if k != "cap"}
    x = jnp.asarray(unit(4, WIDTH, 3), "float32")
    for square, damp in [(1.0, 1.0), (1.49, 1.0), (3.5, np.exp(-1.0))]:
        phi, free = (features.phi(p, x * square**0.5) for p in (params, plain))
        first = WIDTH + 1
        np.testing.assert_allclose(
            phi[:, first:], damp * free[:, first:], rtol=1e-4, atol=1e-6
        )
        np.testing.assert_array_equal(phi[:, :first], free[:, :first])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["gelu", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cos", "exp"))]
)
def test_finite_at_any_norm(name, dtype):
    dim = 4096
    features = make(name, 1.0, num_features=dim + 64, scale=None, projection="gaussian")
    params = features.init(jax.random.key(0), dim, jnp.dtype(dtype))
    kernel = jnp.asarray(unit(2, dim, 1).T, dtype)
    bias = jnp.asarray([0.5, -1.0], dtype)
    psi = features.psi(params, kernel, bias)
    assert np.isfinite(np.asarray(psi, np.float64)).all()
    for norm in (1.0, 1e3, 1e6):
        x = jnp.asarray(unit(2, dim, 2) * norm, dtype)
        phi = features.phi(params, x)
        assert np.isfinite(np.asarray(phi, np.float64)).all()
        y = snnk.contract(phi, psi)
        assert np.isfinite(np.asarray(y, np.float64)).all()
    # Far out only the exact affine part is left.
    line = affine(features, x, kernel, bias)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), np.asarray(line, np.float64), rtol=0.05, atol=1e4
    )


def test_columns_keep_their_size_beyond_the_cap():
    # Half of the squared norm less the excess would lose all digits out there.
    features = make("cos", 1.0)
    params = features.init(jax.random.key(0), WIDTH)
    x = jnp.asarray(unit(8, WIDTH, 3), jnp.float32)
    layout = features.layout(WIDTH)
    cosines = slice(layout.exact, layout.exact + layout.directions)
    sizes = [
        np.sqrt(np.mean(np.asarray(features.phi(params, norm * x))[:, cosines] ** 2))
        for norm in (1e3, 1e5)
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.slow
def test_gradients_do_not_go_through_the_choice():
    # The gradient of the readout is that of the unshrunk one times the factors.
    features = make("gelu", 1.0, num_features=256)
    params = features.init(jax.random.key(0), WIDTH)
    x, kernel, bias = layer(1.0)
    grads = jax.grad(
        lambda w: jnp.sum(snnk.snnk_dense(features, params, x, w, bias) ** 2)
    )(kernel)
    assert np.isfinite(grads).all()
    shrunk, _ = random_rows(features, params, kernel, bias)
    plain = dataclasses.replace(features, shrinkage=False)
    whole, _ = random_rows(plain, params, kernel, bias)
    factors = jnp.asarray(shrunk / whole, "float32")
    first = WIDTH + 1

    def frozen(w):
        psi = plain.psi(params, w, bias)
        rows = psi[first : first + len(factors)] * factors
        psi = psi.at[first : first + len(factors)].set(rows)
        return jnp.sum(snnk.contract(features.phi(params, x), psi) ** 2)

    np.testing.assert_allclose(grads, jax.grad(frozen)(kernel), rtol=1e-3, atol=1e-3)
