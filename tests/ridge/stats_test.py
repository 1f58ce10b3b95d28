"""Statistics: any chunks, any order, any split of the rows give the same sums."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax import ridge
from snnk_jax.ridge import _accumulate
from snnk_jax.ridge._solve import moments
from snnk_jax.testing import count_traces

pytestmark = pytest.mark.usefixtures("route")


def of(problem, rows=slice(None), weights=None, **options):
    phi, y = problem.phi[rows], problem.y[rows]
    stats = ridge.init(phi.shape[1], y.shape[1], **options)
    w = None if weights is None else jnp.asarray(weights)
    return ridge.update(stats, jnp.asarray(phi), jnp.asarray(y), w)


def assert_same(a, b, rtol=1e-6):
    """The same moments about the mean, relative to the largest entry."""
    ours, theirs = moments(a), moments(b)
    assert ours.rows == theirs.rows
    for name in ("gram", "cross", "y_square", "phi_mean", "y_mean"):
        x, y = getattr(ours, name), getattr(theirs, name)
        if name == "gram":
            x, y = np.triu(x), np.triu(y)
        np.testing.assert_allclose(x, y, atol=rtol * np.abs(y).max(), err_msg=name)
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("m", [5, 700], ids=["narrow", "blocks"])
def test_moments_are_those_of_the_rows(make_problem, m, shift, weighted):
    problem = make_problem(n=500, m=m)
    w = problem.weights if weighted else np.ones(500, np.float32)
    ours = moments(of(problem, weights=w if weighted else None, shift=shift))
    phi, y = problem.phi.astype(np.float64), problem.y.astype(np.float64)
    w = w.astype(np.float64)
    mean = w @ phi / w.sum()
    z, t = phi - mean, y - w @ y / w.sum()
    gram, cross = (z * w[:, None]).T @ z, (z * w[:, None]).T @ t
    np.testing.assert_allclose(ours.phi_mean, mean, rtol=1e-6)
    # Without a shift the means, here as large as the spreads, cost a digit.
    exact = {"rtol": 0, "atol": 1e-6 if shift else 1e-5}
    for x, expected in ((np.triu(ours.gram), np.triu(gram)), (ours.cross, cross)):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(x / scale, expected / scale, **exact)
    np.testing.assert_allclose(ours.y_square, w @ t**2, rtol=1e-5)
    assert ours.rows == 500


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 300, 4096])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_do_not_matter(make_problem, chunk_size, weighted):
    problem = make_problem()
    weights = jnp.asarray(problem.weights) if weighted else None
    streamed = ridge.update_chunks(
        ridge.init(20, 3),
        jnp.asarray(problem.phi),
        jnp.asarray(problem.y),
        weights,
        chunk_size=chunk_size,
    )
    assert_same(streamed, of(problem, weights=weights))


@pytest.mark.parametrize("kind", ["numpy", "tree", "keys", "bfloat16"])
def test_inputs_of_any_kind(make_problem, kind):
    problem = make_problem()
    y, phi = jnp.asarray(problem.y), None
    x = jnp.asarray(problem.phi)
    if kind == "numpy":
        expected, x = x, problem.phi
    elif kind == "tree":
        expected, phi = x, lambda parts: jnp.concatenate(parts, axis=1)
        x = (x[:, :7], np.asarray(x[:, 7:]))
    elif kind == "keys":
        x = jax.random.split(jax.random.key(0), len(y))
        phi = jax.vmap(lambda key: jax.random.normal(key, 20))
        expected = phi(x)
    else:
        x = x.astype(jnp.bfloat16)
        expected = x.astype(jnp.float32)
    streamed = ridge.update_chunks(ridge.init(20, 3), x, y, phi=phi, chunk_size=64)
    assert_same(streamed, ridge.update(ridge.init(20, 3), expected, y))


def test_negative_weights_count_as_rows_taken_out(make_problem):
    problem = make_problem(n=100)
    weights = np.where(np.arange(100) < 10, -0.5, 1.0)
    ours = moments(of(problem, weights=weights.astype(np.float32)))
    phi = problem.phi.astype(np.float64)
    z = phi - weights @ phi / weights.sum()
    exact = (z * weights[:, None]).T @ z
    np.testing.assert_allclose(
        np.triu(ours.gram), np.triu(exact), atol=1e-6 * np.abs(exact).max()
    )


def test_traced_by_the_map_alone(make_problem):
    problem = make_problem(n=50, m=4)
    x, y = jnp.asarray(problem.phi), jnp.asarray(problem.y)

    def trace(scale):
        stats = ridge.update_chunks(ridge.init(4, 3), x, y, phi=lambda x: scale * x)
        return jnp.trace(stats.gram.high)

    value, slope = jax.value_and_grad(trace)(jnp.float32(2.0))
    np.testing.assert_allclose(slope, value, rtol=1e-5)
    values = jax.vmap(trace)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(values[1], 4 * values[0], rtol=1e-5)


def test_features_on_the_fly_and_one_compilation(make_problem):
    problem = make_problem(m=6)
    fm = snnk.features.ArcCosine(num_features=32)
    x, y = jnp.asarray(problem.phi), jnp.asarray(problem.y)
    traces = []

    def phi(params, x):
        traces.append(1)
        return fm.phi(params, x)

    def run(params):
        return ridge.update_chunks(
            ridge.init(32, 3), x, y, phi=functools.partial(phi, params), chunk_size=50
        )

    for seed in range(3):
        params = fm.init(jax.random.key(seed), 6)
        streamed = run(params)
        whole = ridge.update(ridge.init(32, 3), fm.phi(params, x), y)
        assert_same(streamed, whole)
        if seed == 0:
            traced = len(traces)
    assert len(traces) == traced, "other parameters must not compile again"


def test_equal_maps_compile_once(make_problem):
    problem = make_problem(n=50, m=4)
    x, y = jnp.asarray(problem.phi), jnp.asarray(problem.y)
    traces = []

    @dataclasses.dataclass(frozen=True)
    class Scaled:
        power: int

        def phi(self, scale, x):
            traces.append(self.power)
            return scale * x**self.power

    for scale in (1.0, 2.0):
        phi = functools.partial(Scaled(2).phi, scale)
        stats = ridge.update_chunks(ridge.init(4, 3), x, y, phi=phi)
        assert_same(stats, ridge.update(ridge.init(4, 3), scale * x**2, y))
        if scale == 1:
            traced = len(traces)
    assert len(traces) == traced
    phi = functools.partial(Scaled(3).phi, 1.0)
    stats = ridge.update_chunks(ridge.init(4, 3), x, y, phi=phi)
    assert_same(stats, ridge.update(ridge.init(4, 3), x**3, y))


def test_keywords_that_are_no_arrays_are_compiled_in(make_problem):
    problem = make_problem(n=50, m=4)
    x, y = jnp.asarray(problem.phi), jnp.asarray(problem.y)

    def phi(x, *, axis, scale, kind):
        return scale * jnp.cumsum(x, axis=axis) if kind == "sum" else x

    for scale in (0.5, jnp.float32(0.5)):
        bound = functools.partial(phi, axis=1, scale=scale, kind="sum")
        stats = ridge.update_chunks(ridge.init(4, 3), x, y, phi=bound)
        expected = 0.5 * jnp.cumsum(x, axis=1)
        assert_same(stats, ridge.update(ridge.init(4, 3), expected, y))


def test_arrays_of_a_module_in_a_keyword_are_read_anew(make_problem):
    problem = make_problem(n=50, m=4)
    x, y = jnp.asarray(problem.phi), jnp.asarray(problem.y)
    model = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))

    def phi(x, *, model):
        return x @ model.kernel[...]

    for scale in (1.0, 5.0):
        model.kernel[...] = scale * jnp.eye(4)
        bound = functools.partial(phi, model=model)
        stats = ridge.update_chunks(ridge.init(4, 3), x, y, phi=bound)
        assert_same(stats, ridge.update(ridge.init(4, 3), scale * x, y))


def test_merge_is_the_union_in_any_order(make_problem):
    problem = make_problem(mean=30.0)
    parts = [of(problem, slice(i, i + 100)) for i in (0, 100, 200)]
    whole = of(problem)
    for order in ((0, 1, 2), (2, 0, 1)):
        assert_same(functools.reduce(ridge.merge, [parts[i] for i in order]), whole)
    assert_same(ridge.merge(ridge.init(20, 3), whole), whole)
    assert_same(ridge.merge(whole, ridge.init(20, 3)), whole)


def test_shifted_and_unshifted_statistics_merge(make_problem):
    problem = make_problem()
    mixed = [of(problem, slice(0, 100), shift=False), of(problem, slice(100, 300))]
    assert_same(ridge.merge(*mixed), of(problem), rtol=1e-5)
    assert_same(ridge.merge(*mixed[::-1]), of(problem), rtol=1e-5)


def test_downdate_is_as_if_the_rows_had_never_been(make_problem):
    problem = make_problem()
    forget = jnp.asarray(problem.phi[40:90]), jnp.asarray(problem.y[40:90])
    left = ridge.downdate(of(problem), *forget)
    keep = np.r_[0:40, 90:300]
    assert_same(left, of(problem, keep))
    assert_same(ridge.downdate_chunks(of(problem), *forget, chunk_size=20), left)
    ours, theirs = ridge.solve(left, 1e-3), ridge.solve(of(problem, keep), 1e-3)
    np.testing.assert_allclose(ours.kernel, theirs.kernel, atol=1e-6)
    np.testing.assert_allclose(ours.bias, theirs.bias, atol=1e-5)


def test_integer_weights_are_repetitions_and_zero_leaves_out(make_problem):
    problem = make_problem(n=60)
    counts = np.random.default_rng(0).integers(0, 4, 60)
    ours = moments(of(problem, weights=counts.astype(np.float32)))
    theirs = moments(of(problem, np.repeat(np.arange(60), counts)))
    scale = np.abs(theirs.gram).max()
    np.testing.assert_allclose(
        np.triu(ours.gram), np.triu(theirs.gram), atol=1e-6 * scale
    )
    assert ours.rows == np.count_nonzero(counts)
    assert ours.weight == counts.sum()


def test_a_large_mean_does_not_take_the_digits(make_problem):
    problem = make_problem(n=2000, m=8, mean=1e4)
    kernel, _, _ = problem.coefficients(1e-3)
    solution = ridge.solve(of(problem), 1e-3)
    np.testing.assert_allclose(solution.kernel, kernel, atol=2e-4)
    # It would without the shift: the test can tell.
    with pytest.warns(ridge.PrecisionWarning):
        bare = ridge.solve(of(problem, shift=False), 1e-3)
    assert np.abs(np.asarray(bare.kernel) - kernel).max() > 1e-3


def test_sums_keep_what_rounding_takes():
    phi = jnp.full((50_000, 1), 0.1)
    stats = ridge.init(1, 1, shift=False)
    stats = ridge.update_chunks(stats, phi, phi, chunk_size=10)
    exact = 5e4 * np.float64(np.float32(0.1)) ** 2
    total = np.float64(stats.gram.high[0, 0]) + np.float64(stats.gram.low[0, 0])
    np.testing.assert_allclose(total, exact, rtol=1e-7)
    term = np.float32(0.1) ** 2 * np.float32(10)
    bare = functools.reduce(np.add, [term] * 5000, np.float32(0))
    assert abs(bare - exact) > 1e-6 * exact, "the test cannot tell"


def test_bfloat16_features_are_multiplied_as_they_are(make_problem):
    problem = make_problem(n=400, m=16)
    phi = jnp.asarray(problem.phi, jnp.bfloat16)
    y = jnp.asarray(problem.y)
    stats = ridge.update(ridge.init(16, 3, shift=False), phi, y)
    same = ridge.update(ridge.init(16, 3), phi.astype(jnp.float32), y)
    assert_same(stats, same, rtol=1e-5)
    text = jax.jit(ridge.update).lower(ridge.init(16, 3, shift=False), phi, y).as_text()
    assert re.search(r"dot_general.*xbf16>, .*xbf16>\) -> tensor<[0-9x]*xf32>", text)
    weighted = ridge.update(
        ridge.init(16, 3, shift=False), phi, y, jnp.ones(400).at[300:].set(0)
    )
    assert_same(weighted, of_rows(phi[:300], y[:300]), rtol=1e-5)


def of_rows(phi, y):
    return ridge.update(
        ridge.init(phi.shape[1], y.shape[1]), phi.astype(jnp.float32), y
    )


def test_float64_statistics_have_its_digits(make_problem):
    problem = make_problem(condition=1e6)
    with jax.enable_x64(True):
        stats = ridge.init(20, 3, jnp.float64)
        phi, y = (np.asarray(a, np.float64) for a in (problem.phi, problem.y))
        stats = ridge.update(stats, jnp.asarray(phi), jnp.asarray(y))
        solution = ridge.solve(stats, 1e-9)
        assert solution.kernel.dtype == jnp.float64
        kernel, bias, _ = problem.coefficients(1e-9)
        scale = np.abs(kernel).max()
        np.testing.assert_allclose(solution.kernel, kernel, atol=1e-8 * scale)
        np.testing.assert_allclose(solution.bias, bias, rtol=1e-8)


def test_bfloat16_features_are_summed_in_float64(make_problem):
    with jax.enable_x64(True):
        phi = jnp.asarray(make_problem(n=2000).phi, jnp.bfloat16)
        stats = ridge.init(20, 1, jnp.float64, shift=False)
        stats = ridge.update(stats, phi, jnp.ones((2000, 1)))
        exact = np.asarray(phi, np.float64).T @ np.asarray(phi, np.float64)
        found = np.triu(moments(stats, intercept=False).gram)
        np.testing.assert_allclose(found, np.triu(exact), rtol=1e-13)


def test_update_is_pure_and_jitted_alike(make_problem):
    problem = make_problem()
    stats = ridge.init(20, 3)
    args = jnp.asarray(problem.phi), jnp.asarray(problem.y)
    assert_same(jax.jit(ridge.update)(stats, *args), ridge.update(stats, *args))
    assert int(stats.rows) == 0
    counted = count_traces(ridge.update)
    step = jax.jit(counted)
    step(step(stats, *args), *args)
    assert counted.traces == 1


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    monkeypatch.setattr(_accumulate, "_LONGEST", 1000)
    m, chunk = 256, 512
    fm = snnk.features.ArcCosine(num_features=m)
    phi = functools.partial(fm.phi, fm.init(jax.random.key(0), 8))

    def temporary(n):
        x, y = jnp.zeros((n, 8)), jnp.zeros((n, 2))
        run = functools.partial(ridge.update_chunks, phi=phi, chunk_size=chunk)
        compiled = jax.jit(run).lower(ridge.init(m, 2), x, y).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(4 * chunk), temporary(64 * chunk)
    assert large <= small * 1.01
    assert large < 4 * (6 * m * m + 6 * chunk * m)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: ridge.init(0, 1), "num_features must be at least 1. Got 0"),
        (lambda s: ridge.init(2, 0), "num_targets must be at least 1. Got 0"),
        (lambda s: ridge.init(2, 1, jnp.bfloat16), "dtype must be .* Got bfloat16"),
        (lambda s: ridge.init(2, 1, "float64"), "with jax_enable_x64. Got float64"),
        (
            lambda s: ridge.update(s, jnp.ones((4, 3)), jnp.ones((4, 1))),
            r"phi must be \[n, 2\].* Got \(4, 3\)",
        ),
        (
            lambda s: ridge.update(s, jnp.ones((4, 2)), jnp.ones((3, 1))),
            "same number of rows",
        ),
        (
            lambda s: ridge.downdate(s, jnp.ones((4, 2)), jnp.ones((4, 2))),
            r"y must be \[n, 1\]",
        ),
        (
            lambda s: ridge.update(s, jnp.ones((4, 2)), jnp.ones((4, 1), int)),
            "one-hot encode classes. Got int32",
        ),
        (
            lambda s: ridge.update(
                s, jnp.ones((4, 2)), jnp.ones((4, 1)), jnp.ones((4, 1))
            ),
            r"weights must be \[4\]",
        ),
        (
            lambda s: ridge.update_chunks(
                s, jnp.ones((4, 2)), jnp.ones((4, 1)), chunk_size=0
            ),
            "chunk_size must be at least 1. Got 0",
        ),
        (
            lambda s: ridge.update_chunks(s, jnp.ones((5, 2)), jnp.ones((4, 1))),
            "x and y must have the same number of rows",
        ),
        (
            lambda s: ridge.update_chunks(
                s, jnp.ones((4, 2)), jnp.ones((4, 1)), phi=lambda x: x[:, :1]
            ),
            r"phi must map 4 rows to \[4, 2\]. Got \(4, 1\)",
        ),
        (
            lambda s: ridge.update_chunks(
                ridge.init(2, 1, shift=False),
                jnp.ones((4, 2)),
                jnp.ones((4, 1)),
                phi=lambda x: x[:, :1],
            ),
            r"phi must map 4 rows to \[4, 2\]. Got \(4, 1\)",
        ),
        (
            lambda s: ridge.downdate_chunks(
                s, jnp.ones((4, 2)), jnp.ones((4, 1)), phi=lambda x: x.T
            ),
            r"phi must map 4 rows to \[4, 2\]. Got \(2, 4\)",
        ),
        (
            lambda s: ridge.update_chunks(
                s, jnp.ones((4, 2)), jnp.ones((4, 1)), phi=lambda x: (x, x)
            ),
            r"phi must map 4 rows to \[4, 2\]. Got \(Shape",
        ),
        (lambda s: ridge.merge(s, ridge.init(3, 1)), "same features and targets"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_told(call, words):
    with pytest.raises(ValueError, match=words):
        call(ridge.init(2, 1))
