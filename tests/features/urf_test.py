import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from snnk_jax.features import URF, AppendOne

WIDTH = 8


def unit(*shape, axis=-1, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=axis, keepdims=True), jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_features", [2, 64])
@pytest.mark.parametrize("activation", ["cos", snnk.activations.get("sin", b=-2.0)])
def test_phi_is_finite_up_to_the_norm_and_nan_beyond(dtype, num_features, activation):
    features = URF(activation=activation, num_features=num_features, scale=0.5)
    params = features.init(jax.random.key(0), WIDTH)
    limit = float(features.max_input_norm(params, jnp.dtype(dtype)))
    # bfloat16 inputs round: by 2^-8 of the norm each.
    slack = 0.01 if dtype == "bfloat16" else 1e-3
    for factor, finite in [(1 - slack, True), (1 + slack, None), (3.0, False)]:
        x = (unit(16, WIDTH) * (limit * factor)).astype(dtype)
        phi = np.asarray(features.phi(params, x), np.float64)
        assert not np.isinf(phi).any()
        if finite is not None:
            assert np.isfinite(phi).all() == finite
            assert np.isnan(phi).all() != finite


def test_max_input_norm_is_tight():
    # With 2 columns the factor before the exponential is 1.
    features = URF(num_features=2, scale=0.5)
    params = features.init(jax.random.key(0), WIDTH)
    limit = features.max_input_norm(params)
    assert np.isfinite(features.phi(params, unit(WIDTH) * (limit * 0.9999))).all()
    assert np.isnan(features.phi(params, unit(WIDTH) * (limit * 1.0001))).all()


def test_max_input_norm_counts_the_mean():
    features = URF(num_features=2, scale=0.5)
    mean = 10 * jnp.eye(WIDTH)[0]
    params = features.init(jax.random.key(0), WIDTH) | {"mean": mean}
    limit = features.max_input_norm(params)
    for sign in (-0.999, 0.999):
        x = sign * limit * jnp.eye(WIDTH)[0]
        assert np.isfinite(features.phi(params, x)).all()


def test_exact_pairs_are_nan_never_inf():
    features = URF(num_features=64, exact_degree=2)
    params = features.init(jax.random.key(0), 4)
    phi = np.asarray(features.phi(params, jnp.full(4, 1e20)))
    assert np.isnan(phi).any()
    assert not np.isinf(phi).any()


def test_no_inf_at_any_size_of_the_exponent():
    # Exponents around log(finfo.max) step by one float32 rounding.
    features = URF(num_features=2, scale=1.0)
    params = {"omega": jnp.zeros((1, 1)), "scale": jnp.ones(())}
    limit = float(features.max_input_norm(params))
    x = jnp.linspace(limit * (1 - 2e-6), limit * (1 + 2e-6), 201)[:, None]
    phi = np.asarray(features.phi(params, x)[:, 0])
    assert not np.isinf(phi).any()
    assert np.isfinite(phi[0])
    assert np.isnan(phi[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_psi_is_nan_never_inf(dtype):
    # The amplitude counts too: 100 exp(88) leaves float32, exp(88) does not.
    row = snnk.activations.get("cos", a=100.0)
    features = URF(activation=row, num_features=2, scale=1.0)
    params = {"omega": jnp.full((1, 1), 1e3), "scale": jnp.ones(())}
    kernel = jnp.asarray([[0.08, 0.088, 0.2]], dtype)
    psi = np.asarray(features.psi(params, kernel), np.float64)
    assert np.isfinite(psi[:, 0]).all()
    assert not np.isinf(psi).any()
    # The other row is times the sine of no bias: zero, if the compiler starts there.
    assert np.isnan(psi[0, 1:]).all()


def test_huge_inputs_and_weights_give_no_inf():
    features = URF(num_features=16)
    params = features.init(jax.random.key(0), WIDTH)
    for norm in (1e3, 1e10, 1e19, 1e25, 3e38):
        assert np.isnan(features.phi(params, unit(4, WIDTH) * norm)).all()
        psi = features.psi(params, unit(WIDTH, 4, axis=0) * norm)
        assert not np.isinf(psi).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_scale_serves_wide_layers(dtype):
    dim = 4096
    features = URF(num_features=64)
    params = features.init(jax.random.key(0), dim)
    assert float(params["scale"]) == dim**-0.25
    x = (unit(4, dim) * dim**0.5).astype(dtype)
    kernel = unit(dim, 4, axis=0).astype(dtype)
    assert np.isfinite(np.asarray(features.phi(params, x), np.float32)).all()
    assert np.isfinite(np.asarray(features.psi(params, kernel), np.float32)).all()
    y = snnk.snnk_dense(features, params, x, kernel)
    assert np.isfinite(np.asarray(y, np.float32)).all()


def test_psi_matches_its_formula():
    row = snnk.activations.get("cos", a=0.8, b=1.5, c=0.4)
    features = URF(activation=row, num_features=6, scale=0.8)
    params = features.init(jax.random.key(0), WIDTH)
    kernel, bias = unit(WIDTH, 2, axis=0), jnp.array([0.3, -0.8])
    g, w, b = (np.asarray(a, np.float64) for a in (params["omega"], kernel, bias))
    root = np.sqrt(1.5)
    size = 0.8 * np.sqrt(2 / 6) * np.exp(root * g @ w / 0.8 - 1.5 / (2 * 0.8**2))
    phase = 1.5 * b + 0.4
    expected = np.concatenate([np.cos(phase) * size, -np.sin(phase) * size])
    np.testing.assert_allclose(features.psi(params, kernel, bias), expected, rtol=1e-5)


def test_best_scale_is_the_documented_one():
    # c^2 = |w| / (s |x|) minimises the bound P + Q of the exponent: 2 s |x| |w|.
    s, x_norm, w_norm = 1.5, 0.7, 0.4
    scales = np.linspace(0.2, 2.0, 2001)
    exponent = (s * scales * x_norm) ** 2 + (w_norm / scales) ** 2
    best = scales[np.argmin(exponent)]
    np.testing.assert_allclose(best**2, w_norm / (s * x_norm), rtol=5e-3)
    np.testing.assert_allclose(exponent.min(), 2 * s * x_norm * w_norm, rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_wrong_fields_are_refused():
    with pytest.raises(ValueError, match="must not be affine.*Got 'identity'"):
        URF(activation="identity", num_features=4)
    with pytest.raises(ValueError, match="must not be affine.*Got 'cos'"):
        URF(activation=snnk.activations.get("cos", a=0.0), num_features=4)
    with pytest.raises(ValueError, match="features must be a feature map. Got 'relu'"):
        AppendOne("relu")
    with pytest.raises(ValueError, match="spectrum must be 'auto', .* Got 'all'"):
        URF(num_features=4, spectrum="all")
    with pytest.raises(ValueError, match="exact_degree must be None, 0, 1 or 2. Got 3"):
        URF(num_features=4, exact_degree=3)
    with pytest.raises(ValueError, match="shape must be at most 0 and finite. Got 0.1"):
        URF(num_features=4, shape=0.1)
    with pytest.raises(ValueError, match="projection must have Gaussian rows"):
        URF(num_features=4, projection="rademacher")
    features = URF(activation="gelu", num_features=12, exact_degree=1)
    words = "must hold 9 exact columns for inputs of width 8 and 6 directions.*Got 12"
    with pytest.raises(ValueError, match=words):
        features.init(jax.random.key(0), WIDTH)
    with pytest.raises(ValueError, match="Did you mean 'cos'"):
        URF(activation="coss", num_features=4)
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            URF(num_features=4, scale=scale)


@pytest.mark.usefixtures("unchecked")
def test_bias_of_a_wrong_shape_is_refused():
    features = URF(num_features=4)
    params = features.init(jax.random.key(0), WIDTH)
    kernel = unit(WIDTH, 2, axis=0)
    for shape in [(3,), (1,), (), (1, 2)]:
        with pytest.raises(ValueError, match=r"bias must have shape \(2,\)"):
            features.psi(params, kernel, jnp.zeros(shape))
