"""Error against depth: networks, bounds, methods, the report, mistakes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import snnk_jax as snnk
from experiments import depth_error, load_config
from experiments.depth_error import Job
from snnk_jax.features import URF


def quick(**changes):
    return load_config("configs/depth_error.py:quicktest", changes)


@pytest.mark.parametrize("activation", depth_error.ACTIVATIONS)
def test_networks_have_their_norms(activation):
    config = quick()
    network = depth_error.make_network(Job(activation, 0.5, 32, 0), config)
    assert len(network.kernels) == len(network.biases) == config.depth
    for kernel in network.kernels:
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 0.5, rtol=1e-5)
    for x in (network.calibration, network.x):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    assert (network.biases[0] is None) == (activation == "arccos")
    other = depth_error.make_network(Job(activation, 0.5, 32, 1), config)
    assert np.all(other.kernels[0] != network.kernels[0])


def test_jobs_have_names_of_their_own():
    config = load_config("configs/depth_error.py")
    names = [job.name for job in depth_error.jobs(config)]
    assert len(set(names)) == len(names) == (3 + 3 + 1) * 2 * len(config.seeds)


@pytest.mark.parametrize("activation", depth_error.ACTIVATIONS)
def test_layers_stretch_no_more_than_their_constant(activation):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    limit = depth_error.lipschitz(activation, kernel)
    x = jnp.asarray(rng.normal(size=(2000, 4)), jnp.float32)
    step = jnp.asarray(1e-2 * rng.normal(size=(2000, 4)), jnp.float32)
    near, far = (
        depth_error.exact_layer(activation, z, kernel, None) for z in (x, x + step)
    )
    ratio = np.linalg.norm(far - near, axis=1) / np.linalg.norm(step, axis=1)
    assert 0.5 * limit < ratio.max() < 1.001 * limit


@pytest.mark.parametrize("activation", depth_error.ACTIVATIONS)
def test_errors_stay_below_the_bound(activation):
    config = quick()
    job = Job(activation, 0.5, 64, 0)
    network = depth_error.make_network(job, config)
    errors, bounds = depth_error.layerwise(job, network, config)
    np.testing.assert_allclose(errors[0], bounds[0], rtol=1e-5)
    assert all(e < 1.001 * b for e, b in zip(errors, bounds, strict=True))
    # By hand, the first layer.
    fm = depth_error.layer_features(job, network.x, network.kernels[0])
    params = fm.init(jax.random.split(jax.random.key(1), config.depth)[0], config.dim)
    layer = network.x, network.kernels[0], network.biases[0]
    difference = snnk.snnk_dense(fm, params, *layer)
    difference -= depth_error.exact_layer(activation, *layer)
    expected = np.sqrt(np.mean(np.sum(np.asarray(difference) ** 2, axis=1)))
    np.testing.assert_allclose(errors[0], expected, rtol=1e-4)


def test_errors_of_bounded_features_stay_below_hoeffding():
    config = quick()
    for seed in (0, 1):
        job = Job("cos", 0.5, 64, seed)
        network = depth_error.make_network(job, config)
        errors, bounds = depth_error.layerwise(job, network, config, bounded=True)
        assert all(e < b for e, b in zip(errors, bounds, strict=True))
        # Four times the features, half the bound: the right way up.
        more = dataclasses.replace(job, num_features=256)
        _, less = depth_error.layerwise(more, network, config, bounded=True)
        np.testing.assert_allclose(less[0], bounds[0] / 2, rtol=1e-5)


def test_products_of_bounded_features_reach_their_bound_and_do_not_pass_it():
    fm = URF(activation="cos", num_features=2, scale=0.8, shape=-0.1)
    kernel = jnp.array([[0.5], [-0.3]])
    # At t = 0 the cosine is one, and the best g is parallel to the weight.
    best = (1.4**0.5 / 0.4) * kernel.T / 0.8
    for x in (jnp.zeros((1, 2)), jnp.array([[0.4, 0.7]])):
        c = depth_error.largest_product(fm, x, kernel)

        def product(omega, x=x):
            params = {"omega": omega[None], "scale": jnp.asarray(0.8)}
            return jnp.abs(snnk.snnk_dense(fm, params, x, kernel))[0, 0]

        draws = 5 * jax.random.normal(jax.random.key(0), (2000, 2))
        assert jax.vmap(product)(draws).max() <= 1.0001 * c
        if not x.any():
            np.testing.assert_allclose(product(best[0]), c[0, 0], rtol=1e-4)


@pytest.mark.parametrize("kappa", [0.1, 1.0, 5.0])
def test_the_shape_makes_the_bound_least(kappa):
    def bound(a):
        return 8 * np.log(1 + 4 * a) + kappa * (1 + 4 * a) / (8 * a)

    best = -depth_error.best_bounded_shape(kappa, 16)
    assert best > 0
    assert bound(best) < min(bound(0.99 * best), bound(1.01 * best))


def test_overflowing_levels_are_infinite():
    config = quick(depth=5, dim=8)
    job = Job("cos", 3.0, 32, 0)
    network = depth_error.make_network(job, config)
    maps = depth_error.level_features(job, config)
    exact = [jnp.zeros((config.examples, config.dim))] * config.depth
    errors, kappas = depth_error.bundled_errors(job, network, maps, exact)
    assert np.isfinite(errors[0])
    assert errors[-1] == np.inf
    assert kappas[-1] is None
    targets = [jnp.zeros((config.calibration, config.dim))] * config.depth
    solved = depth_error.solved_errors(job, network, maps, config, targets, exact)
    np.testing.assert_allclose(solved, 0, atol=1e-6)


@pytest.mark.slow
def test_the_quicktest_measures_writes_and_goes_on(tmp_path):
    config = quick()
    rows = depth_error.run(config, tmp_path, "command")
    assert len(rows) == 6
    for row in rows:
        methods = set(depth_error.METHODS) & set(row)
        missing = set(depth_error.METHODS) - methods
        assert (
            missing
            == {
                "cos": set(),
                "gelu": {"bounded", "hoeffding", "bundled", "closed form"},
                "arccos": {"bounded", "hoeffding"},
            }[row["activation"]]
        )
        assert all(len(row[method]) == config.depth for method in methods)
        if "closed form" in methods:
            assert row["closed form"][0] < 0.5 * row["layerwise"][0]
    report = (tmp_path / "report.md").read_text()
    for title in depth_error.METHODS.values():
        assert title in report
    assert "## kappa of the bundled levels" in report
    assert (tmp_path / "m32.png").read_bytes().startswith(b"\x89PNG")
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines()
    marked = json.loads(lines[0]) | {"layerwise": [7.0, 7.0, 7.0]}
    file.write_text("\n".join([json.dumps(marked), *lines[1:]]) + "\n")
    again = depth_error.run(config, tmp_path, "command")
    assert again[0]["layerwise"] == [7.0, 7.0, 7.0]
    assert again[1] == rows[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activations": ("relu",)}, "config.activations must be some of cos, gelu"),
        ({"activations": ()}, "config.activations must be some of"),
        ({"depth": 0}, "config.depth must be positive. Got 0"),
        ({"norms": (0.5, -1.0)}, "config.norms must be positive"),
        ({"num_features": (16,)}, "config.num_features must be at least 25 for 8"),
        ({"seeds": ()}, "config.seeds must be numbers from 0 on"),
        ({"failure": 1.0}, r"config.failure must be in \(0, 1\)"),
        ({"bias_std": -1.0}, "config.bias_std must not be negative"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_any_work(changes, words):
    with pytest.raises(ValueError, match=words):
        quick(**changes)
