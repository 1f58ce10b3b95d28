import jax.numpy as jnp
from flax import nnx

from experiments.latency import compiled, time_in_turns


def test_calls_take_turns_and_the_first_two_rounds_do_not_count():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = time_in_turns(calls, rounds=3)
    assert "".join(order) == "ab" * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for values in times.values() for value in values)


def test_the_compiled_call_is_that_of_the_model():
    model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
    call, megabytes = compiled(model, x)
    assert jnp.allclose(call(), model(x))
    assert megabytes >= 0
    twice, _ = compiled(model, {"x": x}, apply=lambda m, batch: 2 * m(batch["x"]))
    assert jnp.allclose(twice(), 2 * model(x))
