"""Features from exact columns of a kernel, against what defines them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk

infinite = snnk.infinite
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((60, 6)), jnp.float32)
IMAGES = jnp.asarray(RNG.standard_normal((9, 4, 4, 2)), jnp.float32)
NET = infinite.serial(
    infinite.Dense(1.4, 0.3), infinite.Activation("gelu"), infinite.Dense(1.0, 0.1)
)
CONV = infinite.serial(
    infinite.Conv((3, 3), w_std=1.4),
    infinite.Activation("relu"),
    infinite.GlobalAvgPool(),
    infinite.Dense(1.0),
)


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize(("net", "x"), [(NET, X), (CONV, IMAGES)])
def test_exact_with_landmarks_and_never_above_the_kernel(net, x, kind):
    with jax.enable_x64(True):
        x = x.astype(jnp.float64)
        features = infinite.LandmarkFeatures(net=net, kind=kind)
        m = len(x) // 3
        phi = np.asarray(features.phi(features.init(x[:m]), x))
        exact = np.asarray(net.kernel(x, get=kind))
    assert phi.dtype == np.float64
    np.testing.assert_allclose(phi @ phi[:m].T, exact[:, :m], rtol=1e-8)
    rest = np.linalg.eigvalsh(exact - phi @ phi.T)
    assert rest[0] > -1e-8 * exact[0, 0]
    assert rest[-1] > 1e-4 * exact[0, 0]  # it is an approximation


def test_the_rest_falls_with_landmarks_and_is_nothing_with_all():
    exact = np.asarray(NET.kernel(X, get="ntk"))
    features = infinite.LandmarkFeatures(net=NET)
    errors = []
    for m in (5, 15, 30, 60):
        phi = np.asarray(features.phi(features.init(X[:m]), X))
        errors.append(np.linalg.norm(phi @ phi.T - exact) / np.linalg.norm(exact))
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 1e-5


def test_ridge_on_all_landmarks_is_kernel_ridge():
    y = np.stack([np.sin(X[:, 0]), X[:, 1] * X[:, 2]], axis=1)
    new = jnp.asarray(RNG.standard_normal((7, 6)), jnp.float32)
    features = infinite.LandmarkFeatures(net=NET)
    params = features.init(X)
    fit = snnk.ridge.fit(features.phi(params, X), jnp.asarray(y, jnp.float32), 1e-3)
    exact = infinite.kernel_ridge(np.asarray(NET.kernel(X, get="ntk")), y, 1e-3)
    np.testing.assert_allclose(
        features.phi(params, new) @ fit.kernel + fit.bias[None],
        exact(np.asarray(NET.kernel(new, X, get="ntk"))),
        atol=1e-4,
    )


def test_jit_blocks_dtypes_and_equal_landmarks():
    features = infinite.LandmarkFeatures(net=NET)
    # Twice the same landmark: K(Z, Z) is singular.
    params = features.init(jnp.concatenate([X[:10], X[:10]]))
    phi = features.phi(params, X)
    assert phi.shape == (60, 20)
    assert phi.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(features.phi)(params, X), phi, atol=3e-4)
    small = infinite.LandmarkFeatures(net=NET, batch_size=7)
    np.testing.assert_allclose(small.phi(params, X), phi, atol=3e-4)
    low = X.astype(jnp.bfloat16)
    half = features.phi(features.init(low[:10]), low)
    assert half.dtype == jnp.bfloat16
    found, exact = (np.asarray(a @ a.T, np.float32) for a in (half, phi))
    assert np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(exact)
    gradient = jax.grad(lambda x: jnp.sum(features.phi(params, x) ** 2))(X)
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    features = infinite.LandmarkFeatures(net=NET)
    with pytest.raises(ValueError, match="net must be a layer of infinite. Got 3"):
        infinite.LandmarkFeatures(net=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="kind must be 'ntk' or 'nngp'. Got 'both'"):
        infinite.LandmarkFeatures(net=NET, kind="both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="batch_size must be at least 1. Got 0"):
        infinite.LandmarkFeatures(net=NET, batch_size=0)
    with pytest.raises(ValueError, match="landmarks must be finite"):
        features.init(X.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="x2 must have the shape and dtype of x1"):
        features.phi(features.init(X[:5]), X[:, :3])
