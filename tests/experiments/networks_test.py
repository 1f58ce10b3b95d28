"""Small networks: exact solutions, derivatives through the SNNK, training, reports."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from experiments import load_config, networks
from experiments.networks import mnist_mlp, pictures, pinn, siren, training
from experiments.networks.model import Method, Network, equal_width, methods
from snnk_jax.features import URF, ArcCosine

SINE = URF(activation="sin", num_features=8)
RELU = ArcCosine(num_features=8)


def quick(network, /, **changes):
    return load_config(f"configs/{network}.py:quicktest", changes)


def build(method, problem, config, seed=0):
    return Network(
        method,
        activation=config.model.activation,
        frequency=config.model.frequency,
        example=problem.example,
        rngs=nnx.Rngs(seed),
    )


def test_the_reference_solves_the_burgers_equation():
    viscosity, step = 0.02, 1e-3
    t, x = np.linspace(0.1, 0.9, 5), np.linspace(-0.9, 0.9, 19)

    def u(t, x):
        return pinn.burgers_solution(t, x, viscosity)

    u_t = (u(t + step, x) - u(t - step, x)) / (2 * step)
    u_x = (u(t, x + step) - u(t, x - step)) / (2 * step)
    u_xx = (u(t, x + step) - 2 * u(t, x) + u(t, x - step)) / step**2
    residual = u_t + u(t, x) * u_x - viscosity * u_xx
    # Differences of second order; the terms themselves reach 20.
    assert np.abs(residual).max() < 2e-3 * np.abs(u(t, x) * u_x).max()
    walls = u(t, np.array([-1.0, 1.0]))
    np.testing.assert_allclose(walls, 0, atol=1e-10)
    start = u(np.array([0.0]), x)
    np.testing.assert_allclose(start, -np.sin(np.pi * x)[None], atol=1e-12)


def test_the_reference_is_converged():
    t, x = np.linspace(0, 1, 9), np.linspace(-1, 1, 32)
    np.testing.assert_allclose(
        pinn.burgers_solution(t, x, 0.01),
        pinn.burgers_solution(t, x, 0.01, order=120),
        atol=1e-6,
    )


def test_the_burgers_residual_of_a_known_field():
    config = quick("pinn")
    problem = pinn.burgers(config)
    found = problem.evaluate(lambda x: jnp.zeros((len(x), 1)), problem.data)
    x = np.linspace(-1, 1, problem.truth.shape[1])
    sine, cosine = np.sin(np.pi * x), np.cos(np.pi * x)
    # u = -sin(pi x): u u_x - nu u_xx.
    expected = np.pi * sine * cosine - config.burgers.viscosity * np.pi**2 * sine
    np.testing.assert_allclose(found["residual"], np.mean(expected**2), rtol=1e-4)
    at_start = problem.predict(lambda x: jnp.ones((len(x), 1)), problem.data)[0]
    np.testing.assert_allclose(at_start, problem.truth[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "level"), [(0, 0), (1, 1), (2, 3)])
def test_energies_of_the_two_bodies(factor, level):
    changes = {"two_body.coupling": 4.0, "optim.batch_size": 1024}
    problem = pinn.two_body(quick("pinn", **changes))

    def oscillators(x):
        """The ground state, or one with a quantum in the centre or in the distance."""
        centre = (x[:, 0] + x[:, 1]) / math.sqrt(2)
        distance = (x[:, 0] - x[:, 1]) / math.sqrt(2)
        wave = jnp.exp(-(centre**2) / 2 - 3 * distance**2 / 2)
        wave = wave * jnp.stack([jnp.ones_like(wave), centre, distance])[factor]
        return (wave / jnp.prod(1 - (x / 4.0) ** 2, axis=-1))[:, None]

    found = problem.evaluate(oscillators, problem.data)
    # Frequencies 1 and 3: E = 2 for the ground state.
    np.testing.assert_allclose(found["quotient"], 2 + level, rtol=1e-4)
    assert (found["error"] < 1e-4) == (level == 0)
    batch = problem.loss(oscillators, problem.data, jax.random.key(0))
    np.testing.assert_allclose(batch, 2 + level, rtol=1e-3)


@pytest.mark.parametrize("features", [SINE, RELU], ids=["sin", "relu"])
def test_second_derivatives_through_the_snnk(features):
    method = Method("", (2, 6, 6, 1), 1, features)
    x = jax.random.uniform(jax.random.key(0), (5, 2), minval=-1.0)
    network = Network(
        method, activation="tanh", frequency=0.0, example=x, rngs=nnx.Rngs(0)
    )

    def f(x):
        return network(x)[:, 0]

    step = 1e-2
    hessians = jax.jit(jax.vmap(jax.hessian(lambda row: network(row)[0])))(x)
    derivatives = jax.jit(pinn.derivatives, static_argnums=(0, 2))
    for axis in (0, 1):
        value, first, second = derivatives(f, x, axis)
        np.testing.assert_allclose(value, f(x), rtol=1e-5)
        np.testing.assert_allclose(second, hessians[:, axis, axis], atol=1e-5)
        shift = step * jnp.eye(2)[axis][None]
        above, slope_above, _ = derivatives(f, x + shift, axis)
        below, slope_below, _ = derivatives(f, x - shift, axis)
        np.testing.assert_allclose(first, (above - below) / (2 * step), atol=2e-3)
        if features is SINE:  # no kinks between the two
            difference = (slope_above - slope_below) / (2 * step)
            np.testing.assert_allclose(second, difference, rtol=0.05, atol=2e-2)


@pytest.mark.parametrize("features", [None, SINE, RELU], ids=["dense", "sin", "relu"])
@pytest.mark.parametrize("replaced", [0, 1])
def test_counts_of_parameters(features, replaced):
    method = Method("", (3, 10, 7, 2), replaced if features else None, features)
    network = nnx.eval_shape(
        lambda: Network(
            method,
            activation="sin",
            frequency=30.0,
            example=jnp.ones((4, 3)),
            rngs=nnx.Rngs(0),
        )
    )
    params = jax.tree.leaves(nnx.state(network, nnx.Param))
    assert method.trained == sum(math.prod(leaf.shape) for leaf in params)


@pytest.mark.parametrize("trained", [50, 1_000, 25_345, 60_000])
def test_equal_width_is_the_nearest(trained):
    widths = (2, 128, 128, 1)
    sizes = {w: Method("", (2, w, w, 1)).trained for w in range(1, 300)}
    nearest = min(sizes, key=lambda width: abs(sizes[width] - trained))
    assert equal_width(widths, trained) == nearest


def test_methods_hold_the_original_and_rivals_of_the_same_size():
    config = load_config("configs/mnist_mlp.py:mnist")
    found = methods(config, 784, 10)
    assert len({method.title for method in found}) == len(found) == 9
    by_title = {method.title: method for method in found}
    snnk_layer_1 = by_title["ReLU-SNNK, m = 32, layer 1"]
    index = found.index(snnk_layer_1)
    rival = found[index + 1]
    assert rival.features is None
    assert abs(rival.trained / snnk_layer_1.trained - 1) < 0.03
    # 784-256-256-10 with 32 columns for 784.
    assert snnk_layer_1.trained == 33 * 256 - 256 + 256 + 257 * 256 + 2570


@pytest.mark.parametrize("features", [SINE, RELU], ids=["sin", "relu"])
def test_the_readout_starts_with_outputs_of_the_usual_size(features):
    problem = siren.problems(quick("siren"))[0]
    features = dataclasses.replace(features, num_features=64)
    network = Network(
        Method("", (2, 128, 128, 128, 1), 1, features),
        activation="sin",
        frequency=30.0,
        example=problem.example,
        rngs=nnx.Rngs(0),
    )
    hidden = jnp.sin(30.0 * network.layers[0](problem.example))
    replaced = network.layers[1](hidden)
    assert 0.3 < jnp.mean(replaced**2) < 0.8
    after = network.layers[2](replaced)
    # SIREN's own pre-activations have a unit variance.
    assert 0.3 < jnp.var(30.0 * after) < 2.0


@pytest.mark.slow
def test_training_changes_the_parameters_alone_and_depends_on_the_seed():
    config = quick("siren")
    problem = siren.problems(config)[0]
    method = Method("", (2, 16, 16, 1), 1, SINE)
    results = []
    for seed in (0, 0, 1):
        model = build(method, problem, config)
        frozen = nnx.state(model, snnk.nn.RandomProjection)
        start = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        trained, curve = training.fit(
            model, problem, learning_rate=3e-3, steps=40, evaluations=4, seed=seed
        )
        for a, b in zip(
            jax.tree.leaves(frozen),
            jax.tree.leaves(nnx.state(trained, snnk.nn.RandomProjection)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
        moved = jax.tree.map(
            lambda a, b: bool(jnp.any(a != b)), start, nnx.state(trained, nnx.Param)
        )
        assert all(jax.tree.leaves(moved))
        results.append(curve)
    assert [point["step"] for point in results[0]] == [10, 20, 30, 40]
    assert results[0][-1]["error"] < 0.9 * results[0][0]["error"]
    assert results[0] == results[1] != results[2]


@pytest.mark.slow
def test_rates_and_seeds_share_a_compilation():
    config = quick("siren")
    traces = []
    problem = siren.problems(config)[0]

    def loss(*arguments):
        traces.append(1)
        return problem.loss(*arguments)

    counted = dataclasses.replace(problem, loss=loss)
    method = Method("", (2, 8, 8, 1), 1, RELU)
    for seed, rate in ((0, 1e-3), (1, 3e-3)):
        training.fit(
            build(method, problem, config, seed),
            counted,
            learning_rate=rate,
            steps=4,
            evaluations=2,
            seed=seed,
        )
        assert len(traces) == 1


def test_step_times_are_positive_and_one_for_each():
    config = quick("siren")
    problem = siren.problems(config)[0]
    models = [
        build(method, problem, config)
        for method in (Method("", (2, 8, 8, 1)), Method("", (2, 8, 8, 1), 1, SINE))
    ]
    times = training.step_times(models, problem, steps=2, rounds=2)
    assert len(times) == 2
    assert min(times) > 0


@pytest.mark.parametrize("name", siren.IMAGES)
def test_images(name):
    image = siren.load_image(name, 32)
    assert image.shape == (32, 32)
    assert image.dtype == np.float32
    assert 0 <= image.min() < 0.2
    assert 0.7 < image.max() <= 1


def test_splits_of_mnist_do_not_overlap(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.permutation(256).astype(np.uint8)[:240, None, None]
    arrays = (x, np.arange(240, dtype=np.int32), x[:7], np.arange(7, dtype=np.int32))
    monkeypatch.setattr(
        mnist_mlp.data_lib, "mnist_arrays", lambda folder: arrays[: len(folder)]
    )
    config = quick("mnist_mlp", **{"data.name": "mnist", "data.dir": "four"})
    train, val, test = mnist_mlp.load_splits(config)
    assert [len(labels) for _, labels in (train, val, test)] == [220, 20, 7]
    assert not set(train[1]) & set(val[1])
    for images, labels in (train, val, test):
        np.testing.assert_array_equal(images[:, 0], x[labels, 0, 0])


@pytest.mark.slow
def test_digits_are_read_and_told_apart():
    config = quick("mnist_mlp")
    (problem,) = mnist_mlp.problems(config)
    assert (problem.inputs, problem.outputs) == (64, 10)
    method = Method("", (64, 32, 10), 0, ArcCosine(num_features=64))
    _, curve = training.fit(
        build(method, problem, config),
        problem,
        learning_rate=1e-2,
        steps=200,
        evaluations=2,
        seed=0,
    )
    assert curve[-1]["test_accuracy"] > 80
    assert 0 <= curve[-1]["val_error"] < 20


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    config = quick("siren")
    results = networks.run(config, tmp_path, "command")
    file = tmp_path / "rows.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    titles = {row["method"] for row in results}
    assert len(results) == len(titles) * len(config.seeds)
    # Two rates of the first seed, the better of them for the other, and the times.
    assert len(lines) == len(titles) * 3 + 1
    for title in titles:
        mine = [row for row in lines if row.get("method") == title]
        tried = [row for row in mine if row["seed"] == 0]
        best = min(tried, key=lambda row: row["error"])["learning_rate"]
        chosen = {row["learning_rate"] for row in results if row["method"] == title}
        assert chosen == {best}
    last = lines[-1]
    assert set(last["step_ms"]) == titles
    lines[-1]["step_ms"] = dict.fromkeys(titles, 1234.5)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert networks.run(config, tmp_path, "command") == results
    report = (tmp_path / "report.md").read_text()
    assert "1234.50" in report
    assert "sine-SNNK, m = 8" in report
    for name in ("image.png", "image_curves.png"):
        assert name in report
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["pinn", "mnist_mlp"])
def test_the_quicktests(network, tmp_path):
    config = quick(network)
    results = networks.run(config, tmp_path)
    assert all(np.isfinite(list(row["curve"][-1].values())).all() for row in results)
    report = (tmp_path / "report.md").read_text()
    for name in {row["problem"] for row in results}:
        assert f"## {name}" in report
        assert (tmp_path / f"{name}_curves.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_small_network_finds_the_ground_state():
    config = quick("pinn", **{"two_body.coupling": 0.0, "model.width": 32})
    problem = pinn.two_body(config)
    method = Method("", (2, 32, 32, 1), 1, URF(activation="sin", num_features=32))
    _, curve = training.fit(
        build(method, problem, config),
        problem,
        learning_rate=1e-2,
        steps=600,
        evaluations=2,
        seed=0,
    )
    assert curve[-1]["error"] < 0.1
    assert curve[-1]["energy_error"] < 0.03


def test_a_network_that_diverges_at_every_rate(tmp_path, monkeypatch):
    nothing = [{"step": 1, "error": math.nan, "psnr": math.nan}]
    monkeypatch.setattr(networks, "fit", lambda model, *_, **__: (model, nothing))
    with pytest.raises(ValueError, match=r"learning_rates must hold .* original"):
        networks.run(quick("siren"), tmp_path)


def test_pictures(tmp_path):
    truth = np.linspace(-1, 1, 64).reshape(8, 8)
    pictures.draw(tmp_path / "p.png", truth, {"one": truth + 0.1, "two, b": -truth})
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        ("siren", {"network": "cnn"}, "config.network must be one of siren, .*'cnn'"),
        ("siren", {"features": ("tanh",)}, "features must be some of relu, sin"),
        ("siren", {"features": ()}, "features must be some of"),
        ("siren", {"model.activation": "sinus"}, "activation must be one of .*'sinus'"),
        ("siren", {"model.width": 0}, "model.width must be positive. Got 0"),
        ("siren", {"model.frequency": -1.0}, "frequency must not be negative. Got -1"),
        ("siren", {"model.replaced": (3,)}, r"hidden layers, .* Got \(3,\) of 3"),
        ("siren", {"model.replaced": ()}, "must be hidden layers"),
        ("siren", {"optim.steps": 5}, "multiple of optim.evaluations. Got 5 and 2"),
        ("siren", {"optim.learning_rates": ()}, "learning_rates must be positive"),
        ("siren", {"optim.learning_rates": (0.0,)}, "learning_rates must be positive"),
        ("siren", {"scales": (math.inf,)}, r"scales must be positive. Got \(inf,\)"),
        ("siren", {"num_features": (8, 8)}, "num_features must be different numbers"),
        ("siren", {"num_features": (1,)}, "different numbers from 2 up"),
        ("siren", {"seeds": ()}, "seeds must be different numbers from 0 up"),
        ("siren", {"seeds": (-1,)}, "seeds must be different numbers from 0 up"),
        ("siren", {"timing.rounds": 0}, "timing.rounds must be positive"),
        ("siren", {"data.image": "lena"}, "data.image must be one of china, flower"),
        ("siren", {"data.size": 512}, "data.size must be from 8 to 427"),
        ("pinn", {"problems": ("heat",)}, "problems must be some of two_body, burgers"),
        ("pinn", {"problems": ()}, "problems must be some of"),
        ("pinn", {"two_body.coupling": -1.0}, "coupling must not be negative"),
        ("pinn", {"burgers.viscosity": 0.0}, "viscosity must be positive"),
        ("mnist_mlp", {"data.name": "fashion"}, "data.name must be one of digits"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_any_work(network, changes, message):
    with pytest.raises(ValueError, match=message):
        quick(network, **changes)


def test_arguments_of_the_configs():
    assert load_config("configs/pinn.py:burgers").problems == ("burgers",)
    assert load_config("configs/siren.py:scales").features == ("sin",)
    with pytest.raises(FileNotFoundError, match=r"train-images.*--config.data.dir"):
        mnist_mlp.problems(load_config("configs/mnist_mlp.py:mnist"))
