"""Kernel ridge for kernels that do not fit in memory: by products with them alone."""

import math
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from snnk_jax.infinite import _layers
from snnk_jax.infinite._kernel import blocks
from snnk_jax.infinite._landmarks import whitening
from snnk_jax.infinite._predict import KernelRidge
from snnk_jax.ridge import CGReport, PrecisionWarning

Product = Callable[[np.ndarray], np.ndarray]


class Nystrom(NamedTuple):
    """Features whose Gram matrix approximates a kernel, for :func:`kernel_cg`.

    Attributes:
      phi: [n, r].
      rows: the landmarks, [r].
    """

    phi: np.ndarray
    rows: np.ndarray


def save_kernel(
    path: str | os.PathLike[str],
    net: _layers.Layer,
    x: Any,
    get: str = "ntk",
    *,
    batch_size: int = 1024,
) -> np.memmap:
    """Computes a kernel of x with itself straight to disk, block by block.

    Args:
      path: a ``.npy`` file, complete once it is there.
      net: the layers.
      x: inputs, also a ``numpy.memmap``.
      get: ``"nngp"`` or ``"ntk"``.
      batch_size: rows and columns of a block.

    Returns:
      The matrix, mapped into memory read-only.

    Raises:
      ValueError: as for :func:`snnk_jax.infinite.kernel`.
    """
    path = pathlib.Path(path)
    parts = blocks(net, x, get=get, batch_size=batch_size)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        out: Any = None
        for rows, columns, values in parts:
            if out is None:
                out = np.lib.format.open_memmap(
                    temporary, "w+", values.dtype, (len(x), len(x))
                )
            out[rows, columns] = values
            if rows != columns:
                out[columns, rows] = values.T
        out.flush()
        del out
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
    return np.load(path, mmap_mode="r")


def stored_product(kernel: np.ndarray, *, batch_size: int = 1024) -> Product:
    """The product of a stored kernel with vectors, some of its rows at a time.

    Args:
      kernel: [n, n], also a ``numpy.memmap``.
      batch_size: rows in memory at a time.

    Raises:
      ValueError: for a matrix that is not square, or a batch size below 1.
    """
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"kernel must be [n, n]. Got {kernel.shape}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1. Got {batch_size}.")

    def product(v: np.ndarray) -> np.ndarray:
        rows = range(0, len(kernel), batch_size)
        return np.concatenate(
            [np.asarray(kernel[i : i + batch_size], np.float64) @ v for i in rows]
        )

    return product


def computed_product(
    net: _layers.Layer, x: Any, get: str = "ntk", *, batch_size: int = 1024
) -> Product:
    """The product with a kernel that is computed anew each time and never stored.

    Args:
      net: the layers.
      x: inputs, [n, ...].
      get: ``"nngp"`` or ``"ntk"``.
      batch_size: rows and columns of a block.

    Raises:
      ValueError: as for :func:`snnk_jax.infinite.kernel`.
    """
    blocks(net, x, get=get, batch_size=batch_size)  # raises what it would raise

    def product(v: np.ndarray) -> np.ndarray:
        out = np.zeros(v.shape)
        for rows, columns, values in blocks(net, x, get=get, batch_size=batch_size):
            values = values.astype(np.float64)
            out[rows] += values @ v[columns]
            if rows != columns:
                out[columns] += values.T @ v[rows]
        return out

    return product


def nystrom(
    net: _layers.Layer,
    x: Any,
    rank: int,
    rng: np.random.Generator,
    get: str = "ntk",
    *,
    batch_size: int = 1024,
) -> Nystrom:
    r"""Features of a kernel from its columns at random landmarks S, on the host.

    .. math:: \Phi = K_{:S} K_{SS}^{-1/2}, \qquad \Phi \Phi^\top \approx K

    :class:`LandmarkFeatures` are the same as a map of new inputs.

    Args:
      net: the layers.
      x: inputs, [n, ...].
      rank: number of landmarks r, at most n.
      rng: draws the landmarks.
      get: ``"nngp"`` or ``"ntk"``.
      batch_size: rows and columns of a block.

    Raises:
      ValueError: for a rank outside of [1, n], a kernel that is not finite or zero at
        all landmarks, and as for :func:`snnk_jax.infinite.kernel`.
    """
    if not 1 <= rank <= len(x):
        raise ValueError(f"rank must be in [1, {len(x)}]. Got {rank}.")
    rows = np.sort(rng.choice(len(x), rank, replace=False))
    landmarks = np.asarray(x[rows])
    across, values = np.empty((len(x), rank)), np.empty(0)
    parts = blocks(net, x, landmarks, get, batch_size=batch_size)
    for left, right, values in parts:
        across[left, right] = values
    if not np.isfinite(across).all():
        raise ValueError("x must have a finite kernel. Got one that is not.")
    return Nystrom(across @ whitening(across[rows], values.dtype), rows)


def kernel_cg(
    product: Product,
    y: Any,
    l2: float,
    phi: Any = None,
    *,
    tolerance: float = 1e-6,
    max_steps: int = 500,
) -> tuple[KernelRidge, CGReport]:
    r"""Solves kernel ridge regression by conjugate gradients.

    .. math:: (K + n\, l2\, I)\, \alpha = y - \bar y

    The preconditioner is :math:`(\Phi \Phi^\top + n\, l2\, I)^{-1}` of features of the
    kernel: those of :func:`nystrom`, or a feature map of the network. Each step costs
    one product with the kernel, and the residual at the end another.

    Args:
      product: ``product(v)`` for v [n, o]: :func:`stored_product`,
        :func:`computed_product` or a user's own.
      y: targets, [n, o]. Their mean is the bias of the solution.
      l2: penalty per example, above zero.
      phi: features of the training inputs, [n, m], or None for no preconditioner.
      tolerance: relative residual to stop at.
      max_steps: when to give up.

    Raises:
      ValueError: for shapes that do not fit, or a penalty or tolerance that is not
        positive.

    Warns:
      PrecisionWarning: if the tolerance was not reached.

    Example:
      >>> import numpy as np
      >>> import snnk_jax as snnk
      >>> x = np.linspace(-1, 1, 9)[:, None]
      >>> model, report = snnk.infinite.kernel_cg(
      ...     snnk.infinite.stored_product(x @ x.T), 3 * x + 1, l2=1e-9
      ... )
      >>> model(np.array([[2.0]]) @ x.T).round(4), report.converged
      (array([[7.]]), True)
    """
    y = np.asarray(y, np.float64)
    if y.ndim != 2 or not len(y) or not np.isfinite(y).all():
        raise ValueError(f"y must be finite and [n, o]. Got shape {y.shape}.")
    if not 0 < l2 < math.inf:
        raise ValueError(f"l2 must be positive and finite. Got {l2}.")
    if not tolerance > 0 or max_steps < 1:
        raise ValueError(
            "tolerance must be above zero and max_steps at least 1. "
            f"Got {tolerance} and {max_steps}."
        )
    penalty = l2 * len(y)
    precondition = _preconditioner(phi, penalty, len(y))
    bias = y.mean(axis=0)
    target = y - bias
    size = np.linalg.norm(target, axis=0)
    size = np.where(size > 0, size, 1)
    v, r = np.zeros_like(target), target.copy()
    z = precondition(r)
    p, rz, steps = z, np.sum(r * z, axis=0), 0
    while np.max(np.linalg.norm(r, axis=0) / size) > tolerance and steps < max_steps:
        q = product(p) + penalty * p
        curvature = np.sum(p * q, axis=0)
        # A target that has converged exactly has no direction left.
        alpha = np.where(curvature > 0, rz / np.where(curvature > 0, curvature, 1), 0)
        v, r = v + alpha * p, r - alpha * q
        z = precondition(r)
        new = np.sum(r * z, axis=0)
        p = z + np.where(rz > 0, new / np.where(rz > 0, rz, 1), 0) * p
        rz, steps = new, steps + 1
    # The recursion drifts from the residual, which it would have reported as small.
    r = target - product(v) - penalty * v
    error = float(np.max(np.linalg.norm(r, axis=0) / size))
    report = CGReport(steps, error, error <= tolerance)
    if not report.converged:
        warnings.warn(
            f"conjugate gradients stopped after {steps} steps at a relative residual "
            f"of {error:.1e}, above {tolerance:.0e}. Give more features, raise "
            "max_steps, l2 or the tolerance.",
            PrecisionWarning,
            stacklevel=2,
        )
    return KernelRidge(v, bias, float(l2)), report


def _preconditioner(phi: Any, penalty: float, rows: int) -> Product:
    """``penalty (Phi Phi^T + penalty)^{-1}`` by Woodbury's identity."""
    if phi is None:
        return lambda r: r
    phi = np.asarray(phi, np.float64)
    if phi.ndim != 2 or len(phi) != rows:
        raise ValueError(f"phi must be [n, m] with n = {rows}. Got {phi.shape}.")
    inner = phi.T @ phi + penalty * np.eye(phi.shape[1])
    factor = scipy.linalg.cho_factor(inner, lower=True)
    return lambda r: r - phi @ scipy.linalg.cho_solve(factor, phi.T @ r)
