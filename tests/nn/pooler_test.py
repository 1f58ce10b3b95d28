import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax import adapters
from snnk_jax.features import URF, ArcCosine
from snnk_jax.models.bert import Bert, BertConfig
from snnk_jax.nn import MergedPooler, SNNKMlp, SNNKPooler, merge_pooler
from snnk_jax.testing import call

SIZES = {"hidden_size": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}
TASK = "(pooler|head)/.*"
TANH = URF(activation="tanh", num_features=256, scale=0.5)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (6, 5)), jnp.int32)


class Pooler(nnx.Module):
    def __init__(self, dim, width, size=0.4, use_bias=True):
        key = jax.random.key(1)
        self.dense = nnx.Linear(dim, width, use_bias=use_bias, rngs=nnx.Rngs(0))
        self.dense.kernel[...] = size * jax.random.normal(key, (dim, width))
        if use_bias:
            self.dense.bias[...] = jnp.linspace(-1.0, 1.0, width)

    def __call__(self, x):
        return jnp.tanh(self.dense(x))


def inputs(n=200, dim=4, seed=2):
    return jax.random.normal(jax.random.key(seed), (n, dim))


def make_bert(dropout_rate=0.0):
    config = BertConfig(
        vocab_size=40, max_length=8, num_outputs=3, dropout_rate=dropout_rate, **SIZES
    )
    bert = Bert(config, rngs=nnx.Rngs(0))
    key = jax.random.key(3)
    bert.pooler.dense.kernel[...] = 0.3 * jax.random.normal(key, (16, 16))
    bert.pooler.dense.bias[...] = jnp.linspace(-1.0, 1.0, 16)
    bert.head.kernel[...] = jax.random.normal(key, (16, 3))
    bert.head.bias[...] = jnp.arange(3.0)
    return bert


def with_pooler(bert, features=TANH, **options):
    rule = snnk.SwapRule(
        path="pooler",
        build=lambda pooler, rngs: SNNKPooler.from_pooler(
            pooler, features=features, rngs=rngs, **options
        ),
    )
    return snnk.swap_modules(bert, [rule], rngs=nnx.Rngs(4))[0]


def test_psi_estimates_the_pooler_with_its_bias():
    """Unbiased for the Fourier series of tanh, which is near tanh."""
    pooler, x = Pooler(4, 3), inputs(20)

    def estimate(key):
        params = TANH.init(key, 4)
        dense = pooler.dense
        return snnk.contract(
            TANH.phi(params, x), TANH.psi(params, dense.kernel[...], dense.bias[...])
        )

    found = np.asarray(jax.vmap(estimate)(jax.random.split(jax.random.key(0), 400)))
    error = found.mean(axis=0) - np.asarray(pooler(x))
    noise = found.std(axis=0) / np.sqrt(len(found))
    assert TANH.series is not None
    assert np.all(np.abs(error) < 5 * noise + TANH.series.sup_error)
    layer = SNNKPooler.from_pooler(pooler, features=TANH, rngs=nnx.Rngs(5))
    np.testing.assert_array_equal(
        layer.readout[...],
        TANH.psi(
            layer.projection.params, pooler.dense.kernel[...], pooler.dense.bias[...]
        ),
    )
    assert layer.bias is None


def test_balancing_never_hurts_on_the_samples():
    pooler, x = Pooler(4, 3), inputs()
    errors = [
        float(jnp.mean((layer(x) - pooler(x)) ** 2))
        for layer in (
            SNNKPooler.from_pooler(pooler, features=TANH, x=given, rngs=nnx.Rngs(6))
            for given in (None, x)
        )
    ]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize(
    "features",
    [
        TANH,
        URF(activation="cos", num_features=128, scale=0.5),
        ArcCosine(num_features=128),
    ],
    ids=["tanh", "cos", "relu"],
)
def test_a_readout_fitted_on_samples_holds_on_others(features):
    pooler = Pooler(4, 3)
    layer = SNNKPooler.from_pooler(
        pooler, features=features, init="samples", x=inputs(800), rngs=nnx.Rngs(7)
    )
    x = inputs(seed=8)
    error = jnp.mean((layer(x) - pooler(x)) ** 2) / jnp.var(pooler(x))
    # Arc-cosine features of x alone have no bias inside.
    assert error < (0.1 if isinstance(features, ArcCosine) else 0.01)


def test_the_fit_has_an_intercept():
    pooler = Pooler(4, 3, size=0.0)
    layer = SNNKPooler.from_pooler(
        pooler,
        features=ArcCosine(num_features=8),
        init="samples",
        x=inputs(),
        rngs=nnx.Rngs(0),
    )
    x = inputs(seed=9)
    np.testing.assert_allclose(layer(x), pooler(x), atol=1e-5)


def test_a_linear_stands_for_its_tanh_and_any_batch_rank_will_do():
    linear = Pooler(4, 3).dense
    layer = SNNKPooler.from_pooler(
        linear,
        features=TANH,
        init="samples",
        x=inputs(800).reshape(2, 400, 4),
        rngs=nnx.Rngs(1),
    )
    x = inputs(30, seed=9)
    assert jnp.mean((layer(x) - jnp.tanh(linear(x))) ** 2) < 0.01
    np.testing.assert_allclose(
        layer(x.reshape(2, 3, 5, 4)), layer(x).reshape(2, 3, 5, 3), atol=1e-5
    )


def test_random_takes_the_sizes_alone():
    layer = SNNKPooler.from_pooler(
        Pooler(4, 3), features=TANH, init="random", rngs=nnx.Rngs(1)
    )
    again = SNNKPooler(4, 3, features=TANH, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(layer.readout[...], again.readout[...])


@pytest.mark.parametrize(
    ("pooler", "options", "message"),
    [
        (nnx.Embed(3, 4, rngs=nnx.Rngs(0)), {}, "pooler must be an nnx.Linear or hold"),
        (Pooler(4, 3), {"linear": "up"}, "hold one in 'up'"),
        (Pooler(4, 3), {"init": "zero"}, "init must be one of"),
        (Pooler(4, 3), {"init": "samples"}, "x must be given for init='samples'"),
        (Pooler(4, 3), {"init": "random", "x": jnp.ones((2, 4))}, "is of no use"),
        (
            Pooler(4, 3),
            {"init": "samples", "x": jnp.full((2, 4), jnp.nan)},
            "x must be finite",
        ),
        (Pooler(4, 3), {"features": ArcCosine(num_features=8)}, "bias"),
    ],
)
def test_mistakes_are_told(unchecked, pooler, options, message):
    options = {"features": TANH} | options
    with pytest.raises(ValueError, match=message):
        SNNKPooler.from_pooler(pooler, rngs=nnx.Rngs(0), **options)


def test_merging_with_the_head_is_exact_but_for_rounding():
    swapped = with_pooler(make_bert(dropout_rate=0.1))
    merged = merge_pooler(swapped)
    np.testing.assert_allclose(
        call(merged, TOKENS), call(swapped, TOKENS), rtol=1e-4, atol=1e-4
    )
    assert isinstance(merged.pooler, MergedPooler)
    assert isinstance(merged.head, SNNKMlp)
    assert merged.head.readout.shape == (256, 3)
    assert isinstance(swapped.head, nnx.Linear)
    # Nothing is shared: redrawing one leaves the other.
    values = merged.head.projection.values["omega"]
    values[...] = jnp.zeros_like(values[...])
    assert np.any(np.asarray(swapped.pooler.projection.values["omega"][...]))


@pytest.mark.parametrize("use_bias", [False, True])
def test_merging_keeps_the_biases(use_bias):
    model = nnx.Sequential(
        snnk.nn.SNNKDense(
            *(4, 5),
            features=TANH,
            use_bias=use_bias,
            bias_init=nnx.initializers.ones_init(),
            rngs=nnx.Rngs(0),
        ),
        nnx.Linear(5, 2, use_bias=use_bias, rngs=nnx.Rngs(1)),
    )
    merged = merge_pooler(model, pooler="layers/0", head="layers/1")
    assert (merged.layers[1].bias is not None) == use_bias
    x = inputs(7)
    np.testing.assert_allclose(merged(x), model(x), rtol=1e-4, atol=1e-4)


def test_only_an_snnk_pooler_and_a_linear_head_are_merged():
    bert = make_bert()
    with pytest.raises(ValueError, match="an SNNKPooler at 'pooler'.*Got Pooler"):
        merge_pooler(bert)
    with pytest.raises(ValueError, match="nnx.Linear at 'top'.*NoneType"):
        merge_pooler(with_pooler(bert), head="top")
    with pytest.raises(ValueError, match="widths 3 and 5"):
        merge_pooler(
            nnx.Sequential(
                snnk.nn.SNNKDense(4, 5, features=TANH, rngs=nnx.Rngs(0)),
                nnx.Linear(3, 2, rngs=nnx.Rngs(0)),
            ),
            pooler="layers/0",
            head="layers/1",
        )


def test_sizes_at_bert_base_are_the_arithmetic():
    """590,592 numbers of the pooler go, m of each output come; see maths B 5."""
    m, outputs = 1024, 3
    features = URF(activation="tanh", num_features=m)

    def build():
        bert = Bert(BertConfig.preset("base", num_outputs=outputs), rngs=nnx.Rngs(0))
        return bert, merge_pooler(with_pooler(bert, features, init="random"))

    bert, merged = nnx.eval_shape(build)
    trained = nnx.Any(nnx.PathContains("pooler"), nnx.PathContains("head"))
    before = snnk.nn.count_parameters(bert, trained)
    after = snnk.nn.count_parameters(merged, nnx.All(nnx.Param, trained))
    assert before.trained == 590_592
    assert before.head == 768 * outputs + outputs
    assert (after.trained, after.head) == (0, m * outputs + outputs)
    assert after.frozen == before.frozen


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_file_holds_the_matrix_and_loads_on_the_plain_base(tmp_path, merge, balanced):
    bert = make_bert()
    options = {"x": inputs(300, dim=16)} if balanced else {}
    model = with_pooler(bert, **options)
    model = merge_pooler(model) if merge else model
    file = tmp_path / "head.safetensors"
    found = adapters.fingerprint(bert, exclude=TASK)
    assert found == adapters.fingerprint(model, exclude=TASK)
    size = adapters.save_adapter(file, model, base_fingerprint=found, exclude=TASK)
    numbers = 256 * 3 + 3 if merge else 256 * 16 + 16 * 3 + 3
    if not balanced:  # a balanced projection is stored whole
        assert 4 * numbers <= size <= 4 * numbers + 3000
    loaded = adapters.load_adapter(file, bert)
    np.testing.assert_array_equal(call(loaded, TOKENS), call(model, TOKENS))
    again = adapters.load_adapter(file, model)
    np.testing.assert_array_equal(call(again, TOKENS), call(model, TOKENS))
    bert.embeddings.norm.bias[...] = bert.embeddings.norm.bias[...] + 1e-6
    with pytest.raises(ValueError, match="base_model must be the one"):
        adapters.load_adapter(file, bert)


def test_a_replaced_pooler_goes_with_adapters(tmp_path):
    bert = make_bert()
    features = ArcCosine(num_features=8)
    rule = snnk.SwapRule(
        path=r"blocks/\d+/mlp",
        build=lambda mlp, rngs: snnk.nn.Adapted(
            mlp, snnk.nn.SNNKAdapter(16, features=features, rngs=rngs)
        ),
    )
    model, _ = snnk.swap_modules(with_pooler(bert), [rule], rngs=nnx.Rngs(5))
    adapter = model.blocks[0].mlp.adapter
    adapter.readout[...] = jnp.ones_like(adapter.readout[...])
    file = tmp_path / "both.safetensors"
    adapters.save_adapter(
        file,
        model,
        base_fingerprint=adapters.fingerprint(bert, exclude=TASK),
        exclude=TASK,
    )
    loaded = adapters.load_adapter(file, bert)
    np.testing.assert_array_equal(call(loaded, TOKENS), call(model, TOKENS))


def test_the_readout_learns_and_the_projection_stays():
    merged = merge_pooler(with_pooler(make_bert()))
    graphdef, head, rest = nnx.split(
        merged, nnx.All(nnx.Param, nnx.PathContains("head")), ...
    )

    @jax.jit
    def gradient(head):
        return jax.grad(lambda h: jnp.sum(nnx.merge(graphdef, h, rest)(TOKENS) ** 2))(
            head
        )

    found = dict(nnx.to_flat_state(gradient(head)))
    assert set(found) == {("head", "readout"), ("head", "bias")}
    assert all(np.all(np.isfinite(v[...])) and np.any(v[...]) for v in found.values())


def test_a_merged_head_is_stored_as_accurately_as_the_wider_part():
    fm = snnk.features.ArcCosine(num_features=16)
    pooler = snnk.nn.SNNKDense(
        *(8, 8), features=fm, dtype="float32", param_dtype="bfloat16", rngs=nnx.Rngs(0)
    )
    head = nnx.Linear(8, 3, dtype=jnp.float32, rngs=nnx.Rngs(1))
    merged = snnk.nn.merge_pooler(
        nnx.Sequential(pooler, head), pooler="layers/0", head="layers/1"
    )
    readout = merged.layers[1].readout
    assert readout.dtype == jnp.float32
    exact = np.float64(pooler.readout[...]) @ np.float64(head.kernel[...])
    np.testing.assert_allclose(readout[...], exact, rtol=1e-5, atol=1e-6)
