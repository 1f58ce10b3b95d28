"""What bundled networks are measured against: kernels and trained networks."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snnk_jax import projections
from snnk_jax.typing import Array, Float, Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class FourierFeatures:
    r"""Random Fourier features of the RBF kernel :math:`e^{-\lVert x-y\rVert^2/2}`.

    .. math::
      \Phi(x) = \sqrt{2/m}\,(\cos\Omega x, \sin\Omega x).

    Rahimi and Recht, "Random Features for Large-Scale Kernel Machines", NIPS 2007;
    orthogonal directions: Yu et al., arXiv 1610.09072.

    Args:
      num_features: m, even.
    """

    num_features: int

    def init(self, key: PRNGKeyArray, dim: int) -> Params:
        """Draws the frequencies."""
        half = self.num_features // 2
        return projections.params("orthogonal", key, half, dim, jnp.float32)

    def phi(self, params: Params, x: Float[Array, "n d"]) -> Float[Array, "n m"]:
        """Maps inputs to features."""
        z = projections.apply(params, x)
        waves = jnp.concatenate([jnp.cos(z), jnp.sin(z)], axis=-1)
        return waves * math.sqrt(2 / self.num_features)


def kernel_columns(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    r"""Exact features of :math:`e^{-\lVert x-y\rVert^2/2}` on the span of the rows.

    With :math:`K = U S U^\top` the columns are :math:`K U S^{-1/2}`: ridge regression
    on them is kernel ridge regression.
    """

    def kernel(x: np.ndarray) -> np.ndarray:
        square = np.sum(x**2, axis=1)[:, None] + np.sum(train**2, axis=1)[None]
        return np.exp(-np.maximum(square - 2 * x @ train.T, 0) / 2)

    values, vectors = np.linalg.eigh(kernel(train))
    keep = values > values[-1] * len(values) * np.finfo(np.float64).eps
    root = vectors[:, keep] / np.sqrt(values[keep])
    return [kernel(x) @ root for x in (train, *others)]


def init_mlp(key: PRNGKeyArray, widths: tuple[int, ...]) -> list[tuple[Array, Array]]:
    """He-normal kernels and zero biases of layers of these widths."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        (jax.random.normal(k, (a, b)) * math.sqrt(2 / a), jnp.zeros(b))
        for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def apply_mlp(
    params: list[tuple[Array, Array]], x: Float[Array, "n d"]
) -> Float[Array, "n o"]:
    """A multilayer perceptron with ReLUs."""
    for i, (kernel, bias) in enumerate(params):
        x = (jax.nn.relu(x) if i else x) @ kernel + bias[None]
    return x


def mlp_size(widths: tuple[int, ...]) -> int:
    """Trained parameters of an MLP of these widths."""
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


def matched_width(budget: int, dim: int, outputs: int, layers: int = 1) -> int:
    """The widest hidden layers whose MLP has at most ``budget`` parameters; 1 or more.

    With one multiplication a parameter this matches the FLOPs as well.
    """
    width = 1
    while mlp_size((dim, *[width + 1] * layers, outputs)) <= budget:
        width += 1
    return width


@functools.partial(
    jax.jit, static_argnames=("hidden", "classify", "steps", "checkpoints", "batch")
)
def train_mlps(
    key: PRNGKeyArray,
    x: Float[Array, "s n d"],
    y: Float[Array, "s n o"],
    rows: Array,
    x_judge: Float[Array, "s k d"],
    rates: Float[Array, "s t"],
    decays: Float[Array, "s t"],
    *,
    hidden: tuple[int, ...],
    classify: bool,
    steps: int,
    checkpoints: int,
    batch: int,
) -> Float[Array, "s t c k o"]:
    """Trains MLPs on several splits with several settings at once.

    AdamW with a cosine schedule; every split has its own batches, which its settings
    share, and its own initial values.

    Args:
      key: draws initial values and batches.
      x: training rows of each split.
      y: their targets.
      rows: how many of them count; the others are padding.
      x_judge: rows to predict.
      rates: learning rates of each split's settings.
      decays: their weight decays.
      hidden: widths of the hidden layers.
      classify: cross-entropy of softmax; else the mean squared error.
      steps: of training.
      checkpoints: how often, evenly, predictions are taken; the last ones at the end.
      batch: rows of a step.

    Returns:
      The predictions at every checkpoint.
    """

    def loss(params, x, y):
        out = apply_mlp(params, x)
        if classify:
            return jnp.mean(optax.softmax_cross_entropy(out, y))
        return jnp.mean((out - y) ** 2)

    def one(key, x, y, rows, x_judge, rate, decay):
        first, second = jax.random.split(key)
        params = init_mlp(first, (x.shape[-1], *hidden, y.shape[-1]))
        schedule = optax.cosine_decay_schedule(1.0, steps)
        optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(decay))

        def step(carry, i):
            params, state = carry
            draw = jax.random.randint(jax.random.fold_in(second, i), (batch,), 0, rows)
            grads = jax.grad(loss)(params, x[draw], y[draw])
            updates, state = optimizer.update(grads, state, params)
            size = rate * schedule(i)
            params = jax.tree.map(lambda p, u: p - size * u, params, updates)
            return (params, state), None

        def stretch(carry, start):
            carry, _ = jax.lax.scan(step, carry, start + jnp.arange(each))
            return carry, apply_mlp(carry[0], x_judge)

        each = steps // checkpoints
        starts = jnp.arange(checkpoints) * each
        return jax.lax.scan(stretch, (params, optimizer.init(params)), starts)[1]

    settings = jax.vmap(one, in_axes=(None, None, None, None, None, 0, 0))
    keys = jax.random.split(key, x.shape[0])
    return jax.vmap(settings)(keys, x, y, rows, x_judge, rates, decays)
