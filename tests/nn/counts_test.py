import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.models.bert import Bert, BertConfig
from snnk_jax.models.vit import ViT, ViTConfig

SIZES = {"hidden_size": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32}


def adapted():
    config = BertConfig(vocab_size=30, max_length=8, num_outputs=3, **SIZES)
    rule = snnk.SwapRule(
        path=r"blocks/\d+/(attention|mlp)",
        build=lambda module, rngs: snnk.nn.Adapted(
            module,
            snnk.nn.SNNKAdapter(
                16, features=snnk.features.ArcCosine(num_features=4), rngs=rngs
            ),
        ),
    )
    bert = Bert(config, rngs=nnx.Rngs(0))
    return snnk.swap_modules(bert, [rule], rngs=nnx.Rngs(1))[0]


def test_adapters_and_head_are_counted_apart():
    counts = snnk.nn.count_parameters(adapted())
    # Four adapters with a readout [4, 16] and a modulation; directions and a key.
    assert counts.trained == 4 * 5 * 16
    assert counts.head == 16 * 3 + 3
    assert counts.projections == 4 * (4 * 16 + 2)
    plain = BertConfig(vocab_size=30, max_length=8, num_outputs=3, **SIZES)
    base = snnk.nn.count_parameters(Bert(plain, rngs=nnx.Rngs(0)), nnx.Param)
    assert counts.frozen + counts.head == base.trained + base.head
    assert counts.total == base.total + counts.trained + counts.projections


def test_what_is_trained_is_the_callers_to_say():
    model = adapted()
    probe = snnk.nn.count_parameters(model, nnx.PathContains("head"))
    assert (probe.trained, probe.head) == (0, 16 * 3 + 3)
    full = snnk.nn.count_parameters(model, nnx.Param)
    assert full.frozen == 0
    pooler = snnk.nn.count_parameters(model, nnx.Param, head=nnx.PathContains("pooler"))
    assert pooler.head == 16 * 16 + 16


def test_groups_add_up_to_the_counts():
    model = adapted()
    rows = snnk.nn.parameter_groups(model)
    counts = snnk.nn.count_parameters(model)
    assert sum(row[1] for row in rows) == counts.total
    assert sum(row[2] for row in rows) == counts.trained + counts.head
    assert {row[0] for row in rows} == {
        *("embeddings", "blocks", "blocks (adapters)", "blocks (projections)"),
        *("pooler", "head"),
    }


def test_it_prints_what_it_returns(capsys):
    model = adapted()
    counts = snnk.nn.print_trainable(model)
    assert counts == snnk.nn.count_parameters(model)
    printed = capsys.readouterr().out
    assert "blocks (adapters)                    320         320" in printed
    assert "trained without the head 320, head 51" in printed
    assert f"frozen projections {counts.projections}" in printed


@pytest.mark.parametrize(
    ("family", "num_features", "trained"), [("bert", 8, 165_888), ("vit", 16, 313_344)]
)
def test_shapes_at_the_size_of_base_are_enough(family, num_features, trained):
    features = snnk.features.ArcCosine(num_features=num_features)
    rule = snnk.SwapRule(
        path=r"blocks/\d+/(attention|mlp)",
        build=lambda module, rngs: snnk.nn.Adapted(
            module, snnk.nn.SNNKAdapter(768, features=features, rngs=rngs)
        ),
    )

    def build():
        if family == "bert":
            model = Bert(BertConfig.preset("base"), rngs=nnx.Rngs(0))
        else:
            model = ViT(ViTConfig.preset("B/16", num_classes=2), rngs=nnx.Rngs(0))
        return snnk.swap_modules(model, [rule], rngs=nnx.Rngs(1))[0]

    counts = snnk.nn.count_parameters(nnx.eval_shape(build))
    assert (counts.trained, counts.head) == (trained, 768 * 2 + 2)


def test_state_that_is_no_parameter_does_not_count():
    class Model(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(1))
            self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(2))

    counts = snnk.nn.count_parameters(Model())
    assert (counts.head, counts.frozen, counts.total) == (40, 16, 56)
    assert sum(row[1] for row in snnk.nn.parameter_groups(Model())) == 56


def test_a_merged_head_trains_its_matrix_and_no_directions():
    features = snnk.features.ArcCosine(num_features=64)
    model = adapted()
    model.pooler = snnk.nn.SNNKPooler(16, 16, features=features, rngs=nnx.Rngs(0))
    counts = snnk.nn.count_parameters(snnk.nn.merge_pooler(model))
    assert counts.head == 64 * 3 + 3
    assert counts.projections == 4 * (4 * 16 + 2) + 64 * 16 + 2


def test_another_head_is_trained_by_default():
    counts = snnk.nn.count_parameters(adapted(), head=nnx.PathContains("pooler"))
    assert (counts.trained, counts.head) == (4 * 5 * 16, 16 * 16 + 16)


def test_a_head_of_a_part_is_none_of_the_model():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.attention = nnx.Dict(head=nnx.Linear(8, 8, rngs=rngs))
            self.head = nnx.Linear(8, 3, rngs=rngs)

    assert snnk.nn.count_parameters(Model()).head == 27
    model, _ = snnk.swap_modules(
        Model(),
        [snnk.SwapRule(path="head", build=lambda m, rngs: snnk.nn.Scaled(m, "input"))],
        rngs=nnx.Rngs(0),
    )
    counts = snnk.nn.count_parameters(model)
    assert counts.head == 27 + 8
