"""Runs on token ids: inputs, losses, scores, and that a small encoder learns."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import glue, learning, train
from snnk_jax.models.bert import Bert, BertConfig

RECIPE = learning.Recipe(learning_rate=3e-3, steps=150, batch_size=32, seed=0)


def make_bert(num_outputs=2):
    config = BertConfig(
        hidden_size=32,
        depth=1,
        num_heads=2,
        mlp_dim=32,
        vocab_size=glue.SYNTHETIC_VOCABULARY,
        max_length=12,
        pool="mean",
        num_outputs=num_outputs,
    )
    return Bert(config, rngs=nnx.Rngs(0))


def make_data():
    return glue.load("synthetic_text", directory="", tokenizer="", length=12)


def test_a_model_is_called_with_what_the_batch_holds():
    batch = make_data().train.__getitems__(np.arange(3))
    tokens, token_types, mask = learning.model_inputs(batch)
    np.testing.assert_array_equal(tokens, batch["tokens"])
    np.testing.assert_array_equal(token_types, batch["token_types"])
    np.testing.assert_array_equal(mask, batch["mask"])
    image = np.full((2, 4, 4, 3), 255, np.uint8)
    (images,) = learning.model_inputs({"image": jnp.asarray(image)})
    np.testing.assert_array_equal(images, np.ones((2, 4, 4, 3)))


def test_the_dtype_of_the_labels_chooses_the_loss():
    outputs = jnp.array([[0.5, 2.0], [1.0, -1.0]])
    classes = learning.example_losses(outputs, jnp.array([1, 0]))
    expected = optax.softmax_cross_entropy_with_integer_labels(
        outputs, jnp.array([1, 0])
    )
    np.testing.assert_allclose(classes, expected, rtol=1e-6)
    values = learning.example_losses(outputs[:, :1], jnp.array([0.0, 3.0]))
    np.testing.assert_allclose(values, [0.125, 2.0])


@pytest.mark.slow
@pytest.mark.parametrize("values", [False, True])
def test_a_small_encoder_learns(values, mesh, tmp_path):
    dataset = make_data()
    if values:
        halves = {}
        for name in ("train", "val", "test"):
            split = getattr(dataset, name)
            batch = split.__getitems__(np.arange(len(split)))
            labels = batch.pop("label").astype(np.float32)
            halves[name] = glue.TokenSplit(**batch, labels=labels)
        dataset = dataclasses.replace(
            dataset, **halves, num_classes=1, metric="spearman"
        )
    _, result = train.fit(
        make_bert(dataset.num_classes),
        nnx.Param,
        dataset,
        RECIPE,
        tmp_path,
        mesh=mesh,
        rules=((".*", "replicate"),),
    )
    assert result["metric"] == ("spearman" if values else "accuracy")
    assert result["score"] == result[result["metric"]]
    assert result["score"] > 0.8
    assert ("accuracy" in result) != values
