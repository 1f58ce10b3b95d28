import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import bench_compress as bench


def test_a_block_is_timed_beside_its_replacements():
    rows = bench.block_rows(8, 2, 4, jnp.float32, rounds=3, rngs=nnx.Rngs(0))
    assert [row.name for row in rows] == [
        "dense, width 32",
        "bundled, m=4",
        "own units, m=4",
    ]
    assert all(0 < row.p50_ms <= row.p95_ms for row in rows)
    assert rows[0].gain == 1
    assert [row.flop_ratio for row in rows] == [1, 8, 8]


def test_the_flops_of_the_encoder_are_counted():
    config = bench.BertConfig(hidden_size=4, depth=2, num_heads=1, mlp_dim=16)
    # 4 products of 3 x 4 x 4, 2 of 3 x 3 x 4, and 2 of 3 x 4 x width.
    block = 4 * 48 + 2 * 36
    assert bench.encoder_flops(config, 3, [16, 2]) == 2 * block + 24 * 18


@pytest.mark.slow
def test_the_narrowed_model_has_so_many_units():
    config = bench.BertConfig(
        hidden_size=4, depth=2, num_heads=1, mlp_dim=16, vocab_size=9, pool="mean"
    )
    model = bench.Bert(config, rngs=nnx.Rngs(0))
    small = bench.narrowed(model, r"blocks/[0-9]+/mlp/", 3, slice(1, None))
    assert [b.mlp.fc1.out_features for b in small.blocks] == [16, 3]
    assert [b.mlp.fc2.in_features for b in small.blocks] == [16, 3]
    assert small(jnp.ones((2, 5), int)).shape == (2, 2)


@pytest.mark.parametrize(("gain", "outcome"), [(1.71, "reached"), (1.69, "MISSED")])
def test_the_verdict(gain, outcome):
    row = bench.Row("encoder", "last 6", 64, 1.0, 1.0, gain, 2.0, 0.0)
    other = bench.Row("encoder", "last 6", 8, 1.0, 1.0, 9.0, 2.0, 0.0)
    assert bench.verdict([other, row])[0].endswith(f"goal 1.7: {outcome}.")
    block = bench.Row("block", "bundled, m=4", 64, 1.0, 1.0, 4 * gain, 8.0, 0.0)
    assert bench.verdict([block])[0].endswith(f"goal 85%: {outcome}.")


@pytest.mark.slow
def test_a_stream_counts_its_tokens(tmp_path):
    found = bench.stream(100, str(tmp_path), batch=64)
    assert found["tokens"] == 128
    assert found["mib_beyond_the_model"] >= 0
    assert len(list(tmp_path.iterdir())) == 1
