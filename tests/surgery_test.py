import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from snnk_jax.models.vit import ViT, ViTConfig

CONFIG = ViTConfig(
    hidden_size=8,
    depth=12,
    num_heads=2,
    mlp_dim=16,
    image_size=8,
    patch_size=4,
    num_classes=3,
)


@pytest.fixture(scope="module")
def vit():
    return ViT(CONFIG, rngs=nnx.Rngs(0))


def wrap(module, rngs):
    adapter = snnk.nn.BottleneckAdapter(8, 2, rngs=rngs)
    return snnk.nn.Adapted(module, adapter)


def test_replaces_the_matches_on_a_clone(vit):
    rule = snnk.SwapRule(path=r".*/(mlp|attention)", build=wrap)
    model, report = snnk.swap_modules(vit, [rule], rngs=nnx.Rngs(1))
    names = [f"blocks/{i}/{kind}" for i in range(12) for kind in ("attention", "mlp")]
    assert report.matched == {rule.path: tuple(names)}
    assert report.unused == ()
    assert all(isinstance(m.mlp, snnk.nn.Adapted) for m in model.blocks)
    assert not any(isinstance(m.mlp, snnk.nn.Adapted) for m in vit.blocks)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    np.testing.assert_array_equal(model(x), vit(x))
    model.blocks[0].norm1.scale[...] = jnp.zeros(8)
    assert np.all(vit.blocks[0].norm1.scale[...] == 1)


def test_where_slices_the_matches_in_model_order(vit):
    rule = snnk.SwapRule(path=r".*/mlp", build=wrap, where=slice(9, None))
    _, report = snnk.swap_modules(vit, [rule], rngs=nnx.Rngs(1))
    assert report.matched[rule.path] == tuple(f"blocks/{i}/mlp" for i in (9, 10, 11))


def test_the_first_rule_wins(vit):
    first = snnk.SwapRule(path=r"blocks/0/mlp", build=wrap)
    rest = snnk.SwapRule(path=r".*/mlp", build=wrap)
    _, report = snnk.swap_modules(vit, [first, rest], rngs=nnx.Rngs(1))
    assert report.matched["blocks/0/mlp"] == ("blocks/0/mlp",)
    assert len(report.matched[".*/mlp"]) == 11


def test_builders_draw_in_model_order(vit):
    def kernels(rules):
        model, _ = snnk.swap_modules(vit, rules, rngs=nnx.Rngs(1))
        return [block.mlp.adapter.down_kernel[...] for block in model.blocks]

    rule = snnk.SwapRule(path=r".*/mlp", build=wrap)
    backwards = [
        snnk.SwapRule(path=rf"blocks/{i}/mlp", build=wrap) for i in reversed(range(12))
    ]
    for a, b in zip(kernels([rule]), kernels(backwards), strict=True):
        np.testing.assert_array_equal(a, b)
    different = kernels([rule])
    assert not np.allclose(different[0], different[1])


def test_an_unused_rule_raises_and_lists_the_paths(vit):
    rules = [
        snnk.SwapRule(path=r".*/mlp", build=wrap),
        snnk.SwapRule(path=r".*/ffn", build=wrap),
    ]
    with pytest.raises(ValueError, match=r"every rule must replace.*ffn.*blocks/0/mlp"):
        snnk.swap_modules(vit, rules, rngs=nnx.Rngs(1))


def test_a_slice_that_leaves_nothing_is_unused(vit):
    rule = snnk.SwapRule(path=r".*/mlp", build=wrap, where=slice(12, None))
    with pytest.raises(ValueError, match="every rule must replace a module"):
        snnk.swap_modules(vit, [rule], rngs=nnx.Rngs(1))


def test_nested_claims_are_refused(vit):
    rules = [
        snnk.SwapRule(path=r"blocks/0", build=wrap),
        snnk.SwapRule(path=r"blocks/0/mlp", build=wrap),
    ]
    with pytest.raises(ValueError, match="'blocks/0/mlp' inside 'blocks/0'"):
        snnk.swap_modules(vit, rules, rngs=nnx.Rngs(1))


def test_identity_builder_changes_nothing(vit):
    rule = snnk.SwapRule(path=r".*/mlp", build=lambda module, rngs: module)
    model, _ = snnk.swap_modules(vit, [rule], rngs=nnx.Rngs(1))
    before, after = nnx.split(vit), nnx.split(model)
    assert before[0] == after[0]
    same = jax.tree.map(lambda a, b: (a == b).all(), before[1], after[1])
    assert jax.tree.all(same)


def test_works_on_shapes_alone():
    def build():
        rule = snnk.SwapRule(path=r".*/mlp", build=wrap)
        vit = ViT(CONFIG, rngs=nnx.Rngs(0))
        return snnk.swap_modules(vit, [rule], rngs=nnx.Rngs(1))[0]

    shapes = nnx.eval_shape(build)
    assert shapes.blocks[3].mlp.adapter.up_kernel.shape == (2, 8)


def test_find_modules_sorts_lists_by_number(vit):
    names = list(snnk.find_modules(vit, r"blocks/\d+"))
    assert names == [f"blocks/{i}" for i in range(12)]


def test_bad_rules(unchecked):
    with pytest.raises(ValueError, match="path must be a regular expression"):
        snnk.SwapRule(path="(", build=wrap)
    with pytest.raises(ValueError, match="build must be callable"):
        snnk.SwapRule(path=".*", build=3)  # pyright: ignore


def test_a_second_rule_of_the_same_path_is_unused(vit):
    rules = [snnk.SwapRule(path=r"blocks/0/mlp", build=wrap) for _ in range(2)]
    with pytest.raises(ValueError, match=r"none before it does. Got unused \['blocks"):
        snnk.swap_modules(vit, rules, rngs=nnx.Rngs(1))


@pytest.mark.usefixtures("unchecked")
def test_rules_that_could_not_work_are_refused(vit):
    for where in (0, 2, [0]):
        with pytest.raises(ValueError, match="where must be None or a slice .* Got"):
            snnk.SwapRule(path=".*/mlp", build=wrap, where=where)
    with pytest.raises(ValueError, match="path must be a regular expression. Got 3"):
        snnk.SwapRule(path=3, build=wrap)
    with pytest.raises(
        ValueError, match=r"path must be a regular expression. Got '\('"
    ):
        snnk.find_modules(vit, "(")
    good = (snnk.SwapRule(path=f"blocks/{i}/mlp", build=wrap) for i in (1, 2))
    _, report = snnk.swap_modules(vit, good, rngs=nnx.Rngs(0))
    assert list(report.matched) == ["blocks/1/mlp", "blocks/2/mlp"]
    rule = snnk.SwapRule(path="blocks/3/mlp", build=lambda module, rngs: None)
    with pytest.raises(ValueError, match="return a module .* blocks/3/mlp. Got N"):
        snnk.swap_modules(vit, [rule], rngs=nnx.Rngs(0))
    for rules in (rule, ["blocks/3/mlp"]):
        with pytest.raises(ValueError, match="rules must be a list of SwapRule. Got"):
            snnk.swap_modules(vit, rules, rngs=nnx.Rngs(0))
