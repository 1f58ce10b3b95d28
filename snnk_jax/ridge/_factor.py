"""Factorisations of ``C + penalty * I`` on the host, in float64.

Gram matrices are C-ordered arrays of which the upper triangle counts. LAPACK reads the
transposed view of such an array as a lower triangle in its own order, so nothing of
size ``m^2`` is copied to change the layout.
"""

import dataclasses
from typing import Any

import numpy as np
import scipy.linalg

# Their functions are made at run time, unknown to type checkers.
blas: Any = scipy.linalg.blas
lapack: Any = scipy.linalg.lapack

_BLOCK = 8192


@dataclasses.dataclass(frozen=True)
class Cholesky:
    """``C + penalty * I = L L^T``.

    Attributes:
      lower: L, in LAPACK's order; what stands above the diagonal means nothing.
      penalty: what was added to the diagonal.
      condition: estimate of the 2-norm condition number.
    """

    lower: np.ndarray
    penalty: float
    condition: float

    def solve(self, b: np.ndarray) -> np.ndarray:
        """``(C + penalty * I)^{-1} b``."""
        return lapack.dpotrs(self.lower, b, lower=1)[0]

    def dof(self) -> float:
        """``tr C (C + penalty * I)^{-1}``."""
        inverse = lapack.dtrtri(self.lower, lower=1)[0]
        trace = sum(np.sum(inverse[i:, i] ** 2) for i in range(len(inverse)))
        return len(inverse) - self.penalty * float(trace)

    def quadratic(self, z: np.ndarray) -> np.ndarray:
        """``z^T (C + penalty * I)^{-1} z`` of every row of z."""
        half = lapack.dtrtrs(self.lower, z.T, lower=1)[0]
        return np.sum(half**2, axis=0)

    def sandwich(self) -> np.ndarray:
        """Diagonal of ``(C + penalty * I)^{-1} C (C + penalty * I)^{-1}``."""
        inverse = lapack.dpotri(self.lower, lower=1)[0]
        squares = np.zeros(len(inverse))
        for i in range(len(inverse)):
            below = inverse[i + 1 :, i] ** 2
            squares[i] += np.sum(below) + inverse[i, i] ** 2
            squares[i + 1 :] += below
        return np.diagonal(inverse) - self.penalty * squares


@dataclasses.dataclass(frozen=True)
class Dual:
    """The same by the Gram matrix of the rows, for fewer rows than features.

    Attributes:
      rows: Z, ``[n, m]``, with ``C = Z^T Z``.
      factor: Cholesky factors of ``Z Z^T + penalty * I``.
    """

    rows: np.ndarray
    factor: Cholesky

    @property
    def penalty(self) -> float:
        return self.factor.penalty

    @property
    def condition(self) -> float:
        return self.factor.condition

    def solve(self, b: np.ndarray) -> np.ndarray:
        inside = self.rows.T @ self.factor.solve(self.rows @ b)
        return (b - inside) / self.penalty

    def dof(self) -> float:
        return self.factor.dof()

    def quadratic(self, z: np.ndarray) -> np.ndarray:
        inside = self.factor.quadratic(z @ self.rows.T)
        return (np.sum(z**2, axis=1) - inside) / self.penalty

    def sandwich(self) -> np.ndarray:
        # (C + p)^{-1} Z^T = Z^T (Z Z^T + p)^{-1}
        return np.sum(self.factor.solve(self.rows) ** 2, axis=0)


@dataclasses.dataclass(frozen=True)
class Eigen:
    """``C = V diag(values) V^T``, on the directions where C is not zero.

    Attributes:
      values: ``[r]``, above zero.
      vectors: V, ``[m, r]``.
      penalty: what is added to the diagonal, zero or more.
    """

    values: np.ndarray
    vectors: np.ndarray
    penalty: float

    @property
    def condition(self) -> float:
        if not len(self.values):
            return 1.0
        low = self.values.min() if self._full else 0.0
        top = self.values.max() + self.penalty
        return float(top / (low + self.penalty)) if low + self.penalty else np.inf

    def solve(self, b: np.ndarray) -> np.ndarray:
        """For b in the range of C; the least norm where the penalty is zero."""
        return self.vectors @ (
            (self.vectors.T @ b) / (self.values + self.penalty)[:, None]
        )

    def dof(self) -> float:
        return float(np.sum(self.values / (self.values + self.penalty)))

    def quadratic(self, z: np.ndarray) -> np.ndarray:
        inside = z @ self.vectors
        seen = inside**2 @ (1 / (self.values + self.penalty))
        if self._full or self.penalty == 0:
            return seen
        outside = z - inside @ self.vectors.T
        return seen + np.sum(outside**2, axis=1) / self.penalty

    def sandwich(self) -> np.ndarray:
        return self.vectors**2 @ (self.values / (self.values + self.penalty) ** 2)

    @property
    def _full(self) -> bool:
        return self.vectors.shape[0] == self.vectors.shape[1]


Factor = Cholesky | Dual | Eigen


def cholesky(gram: np.ndarray, penalty: float) -> Cholesky | None:
    """Factors ``gram``, which is overwritten; None where rounding leaves no digits."""
    top = largest(gram) + penalty
    diagonal = np.einsum("ii->i", gram)
    diagonal += penalty
    lower = _lower(gram.T)
    if lower is None:
        return None
    low = 1 / _power(lambda v: lapack.dpotrs(lower, v, lower=1)[0], len(lower))
    condition = float(top / low)
    if condition > 0.1 / (len(lower) * np.finfo(np.float64).eps):
        return None
    return Cholesky(lower, penalty, condition)


def _lower(matrix: np.ndarray) -> np.ndarray | None:
    """The Cholesky factor in the lower triangle of ``matrix``; None if there is none.

    In blocks: OpenBLAS's dpotrf crashes the process with several threads at 16384.
    """
    num = len(matrix)
    for start in range(0, num, _BLOCK):
        own = slice(start, min(start + _BLOCK, num))
        part = matrix[own, own]
        factor, info = lapack.dpotrf(part, lower=1, overwrite_a=1, clean=0)
        if info:
            return None
        matrix[own, own] = factor
        if own.stop < num:
            rows = matrix[own.stop :, own]
            rows = blas.dtrsm(1.0, factor, rows, side=1, lower=1, trans_a=1)
            matrix[own.stop :, own] = rows
            for left in range(0, len(rows), _BLOCK):
                columns = slice(own.stop + left, own.stop + left + _BLOCK)
                change = rows[left:] @ rows[left : left + _BLOCK].T
                matrix[columns.start :, columns] -= change
    return matrix


def eigen(gram: np.ndarray, penalty: float = 0.0) -> Eigen:
    """Eigenvectors of ``gram``, those of rounding noise left out."""
    values, vectors = np.linalg.eigh(gram, UPLO="U")
    keep = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return Eigen(values[keep], vectors[:, keep], penalty)


def svd(rows: np.ndarray, penalty: float = 0.0) -> Eigen:
    """Eigenvectors of ``rows^T rows`` without squaring the condition of the rows."""
    if rows.shape[0] > rows.shape[1]:
        rows = np.asarray(np.linalg.qr(rows, mode="r"))
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    keep = values > values[0] * max(rows.shape) * np.finfo(np.float64).eps
    return Eigen(values[keep] ** 2, vectors[keep].T, penalty)


def multiply(gram: np.ndarray, v: np.ndarray) -> np.ndarray:
    """``C @ v`` from the upper triangle of C."""
    return blas.dsymm(1.0, gram.T, v, lower=1)


def largest(gram: np.ndarray) -> float:
    """The largest eigenvalue of C from its upper triangle."""
    return _power(lambda v: blas.dsymv(1.0, gram.T, v, lower=1), len(gram))


def _power(apply: Any, size: int, steps: int = 30) -> float:
    """Largest eigenvalue of a positive semi-definite map, within a few per cent."""
    v = np.random.default_rng(0).normal(size=size)
    value = 0.0
    for _ in range(steps):
        norm = np.linalg.norm(v)
        if norm == 0:
            return 0.0
        v = apply(v / norm)
        v = v.reshape(size)
        last, value = value, float(np.linalg.norm(v))
        if value - last <= 1e-3 * value:
            break
    return value
