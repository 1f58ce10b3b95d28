"""The pooler of a pretrained encoder as an SNNK, alone or merged with the head."""

import re
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from snnk_jax.bundling import merge_bias, merge_readout
from snnk_jax.calibration import fit_linear
from snnk_jax.features import FeatureMap
from snnk_jax.features._towers import TowerFeatures
from snnk_jax.nn._arguments import float_dtype
from snnk_jax.nn._dense import SNNKDense
from snnk_jax.nn._linear import is_plain, sample_rows, wider
from snnk_jax.nn._mlp import SNNKMlp
from snnk_jax.surgery import SwapRule, find_modules, swap_modules
from snnk_jax.typing import Array, Float

_INITS = ("psi", "samples", "random")


class SNNKPooler(SNNKDense):
    r"""Stands for Linear and tanh behind an encoder: :math:`y = \Phi(x)\Psi + b`.

    An :class:`SNNKDense` that is taken from a pooler, of BERT or any other model; see
    there for the arguments, and :func:`merge_pooler` for its end.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> from snnk_jax.models.bert import Bert, BertConfig
      >>> bert = Bert(BertConfig.preset("tiny", vocab_size=99), rngs=nnx.Rngs(0))
      >>> fm = snnk.features.URF(activation="tanh", num_features=256, scale=0.1)
      >>> rule = snnk.SwapRule(
      ...     path="pooler",
      ...     build=lambda pooler, rngs: snnk.nn.SNNKPooler.from_pooler(
      ...         pooler, features=fm, init="random", rngs=rngs
      ...     ),
      ... )
      >>> swapped, _ = snnk.swap_modules(bert, [rule], rngs=nnx.Rngs(1))
      >>> swapped.pooler.readout.shape
      (256, 128)
    """

    @classmethod
    def from_pooler(
        cls,
        pooler: nnx.Module,
        *,
        features: FeatureMap,
        linear: str = "dense",
        init: Literal["psi", "samples", "random"] = "psi",
        x: Float[Array, "*b d"] | None = None,
        rngs: nnx.Rngs,
    ) -> "SNNKPooler":
        r"""Builds the layer that estimates ``pooler(x)``.

        Args:
          pooler: the pretrained pooler; an ``nnx.Linear`` means its tanh.
          features: the feature map.
          linear: attribute of ``pooler`` that holds its ``nnx.Linear``.
          init: where the readout comes from. ``"psi"``: :math:`\Psi(W, b)` of the
            weights, unbiased for the function of the map, which is the pooler's for
            ``URF(activation="tanh")`` (its Fourier series carries the bias, and its
            linear part takes 1 + d of the columns) and a proxy for others.
            ``"samples"``: ridge regression of ``pooler(x)`` on the features, with an
            intercept (:func:`snnk_jax.calibration.fit_linear`), biased and far more
            accurate. ``"random"``: sizes alone are taken.
          x: sample inputs of the pooler. Exponential-type maps are balanced to them
            (:func:`snnk_jax.calibration.balance`), which BERT's hidden states, of norm
            :math:`\sqrt d`, need.
          rngs: random streams ``projection`` and ``params``.

        Raises:
          ValueError: for another ``init``, no ``nnx.Linear`` in the pooler, samples
            that are missing, of another width, not finite or of no use, or a bias that
            the map cannot carry.
        """
        dense = (
            pooler if isinstance(pooler, nnx.Linear) else getattr(pooler, linear, None)
        )
        if not is_plain(dense):
            raise ValueError(
                f"pooler must be an nnx.Linear or hold one in {linear!r}. Got "
                f"{type(pooler).__name__} with {type(dense).__name__}."
            )
        if init not in _INITS:
            raise ValueError(f"init must be one of {', '.join(_INITS)}. Got {init!r}.")
        balanced = isinstance(features, TowerFeatures)
        useful = {"psi": balanced or x is None, "samples": True, "random": x is None}
        if not useful[init] or (init == "samples" and x is None):
            raise ValueError(
                "x must be given for init='samples', and is of no use for "
                "init='random' nor, with features that cannot be balanced, for "
                f"init='psi'. Got {'no ' if x is None else ''}x and {init!r} with "
                f"{type(features).__name__}."
            )
        rows = None if x is None else sample_rows(x, dense)
        layer = cls(
            dense.in_features,
            dense.out_features,
            features=features,
            # Psi carries the pooler's bias, a regression has an intercept.
            use_bias=init != "psi",
            dtype=dense.dtype,
            param_dtype=dense.param_dtype,
            rngs=rngs,
        )
        if init == "random":
            return layer
        if rows is not None and balanced:
            layer.projection.balance(dense, rows)
        if init == "psi":
            layer.readout[...] = layer.projection.psi(dense)
            return layer
        assert rows is not None
        assert layer.bias is not None
        module: Any = pooler
        targets = jnp.tanh(dense(rows)) if module is dense else module(rows)
        phi = layer.projection(rows)
        centre, level = (jnp.mean(a, axis=0, keepdims=True) for a in (phi, targets))
        readout, _ = fit_linear(phi - centre, targets - level)
        layer.readout[...] = readout.astype(dense.param_dtype)
        layer.bias[...] = (level - centre @ readout)[0].astype(dense.param_dtype)
        return layer


class MergedPooler(nnx.Module):
    """Stands where a pooler was that the head has taken in: returns its input."""

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return x


def merge_pooler(
    model: nnx.Module, *, pooler: str = "pooler", head: str = "head"
) -> Any:
    r"""Merges an SNNK pooler with the classifier behind it, on a clone.

    .. math:: (\Phi(x)\Psi + b)\,W + b' = \Phi(x)\,(\Psi W) + (b W + b')

    exactly but for rounding, to the wider of both storage dtypes: both are linear in
    the features. (Outputs have the dtype of the features, which a Linear of wider
    parameters would have widened.) The head becomes an
    :class:`SNNKMlp` with one matrix ``[m, num_outputs]``, the pooler a
    :class:`MergedPooler` without parameters. Of BERT-base's 590,592 numbers of the
    pooler none is left.

    The model must apply the head to what the pooler returns. Dropout between the two
    is off at inference, where the merged model returns the same up to rounding; when
    it is trained further, that dropout acts on the inputs of the features. To train
    the merged head from the start, put ``SNNKMlp(d, num_outputs, features=...)`` and
    :class:`MergedPooler` in their places by :func:`snnk_jax.swap_modules`.

    Args:
      model: a model with a pooler replaced by :class:`SNNKPooler` (or
        :class:`SNNKDense`); left as it is.
      pooler: its path.
      head: path of the ``nnx.Linear`` behind it.

    Raises:
      ValueError: if the modules are others, do not fit or compute in different dtypes.

    References:
      Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225 (bundling).

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> fm = snnk.features.ArcCosine(num_features=32)
      >>> model = nnx.Sequential(
      ...     snnk.nn.SNNKDense(8, 8, features=fm, rngs=nnx.Rngs(0)),
      ...     nnx.Linear(8, 3, rngs=nnx.Rngs(1)),
      ... )
      >>> merged = snnk.nn.merge_pooler(model, pooler="layers/0", head="layers/1")
      >>> merged.layers[1].readout.shape
      (32, 3)
      >>> x = jnp.ones((2, 8))
      >>> bool(jnp.allclose(merged(x), model(x), atol=1e-5))
      True
    """
    found = find_modules(model)
    old, linear = found.get(pooler), found.get(head)
    if not (isinstance(old, SNNKDense) and is_plain(linear)):
        raise ValueError(
            f"model must have an SNNKPooler at {pooler!r} and an nnx.Linear at "
            f"{head!r}. Got {type(old).__name__} and {type(linear).__name__}."
        )
    dtype = float_dtype("dtype", linear.dtype)
    # NumPy holds float64 for equal to None.
    if old.out_features != linear.in_features or str(old.dtype) != str(dtype):
        raise ValueError(
            "the head must read what the pooler writes, in its dtype. Got widths "
            f"{linear.in_features} and {old.out_features}, dtypes {dtype} and "
            f"{old.dtype}."
        )
    # The products are stored as accurately as the wider of their factors.
    wide = wider(old.readout.dtype, linear.kernel.dtype)
    own = None if old.bias is None else old.bias[...].astype(wide)
    behind = None if linear.bias is None else linear.bias[...]
    bias = merge_bias(own, linear.kernel[...], behind)
    merged = SNNKMlp(
        old.in_features,
        linear.out_features,
        features=old.projection.features,
        use_bias=bias is not None,
        dtype=old.dtype,
        param_dtype=wide,
        readout_init=nnx.initializers.zeros_init(),
        rngs=nnx.Rngs(0),
    )
    merged.projection = nnx.clone(old.projection)
    readout = merge_readout(old.readout[...].astype(wide), linear.kernel[...])
    merged.readout[...] = readout
    if merged.bias is not None and bias is not None:
        merged.bias[...] = bias.astype(wide)
    rules = [
        SwapRule(path=re.escape(pooler), build=lambda module, rngs: MergedPooler()),
        SwapRule(path=re.escape(head), build=lambda module, rngs: merged),
    ]
    return swap_modules(model, rules, rngs=nnx.Rngs(0))[0]
