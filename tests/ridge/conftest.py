"""Regressions in float64 to compare with."""

import dataclasses

import numpy as np
import pytest

from snnk_jax.ridge import _accumulate


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows with a known mean, spectrum and noise; float32."""

    phi: np.ndarray
    y: np.ndarray
    weights: np.ndarray

    def coefficients(self, l2, weights=None, intercept=True):
        """The textbook formula in float64: kernel, bias, penalty."""
        phi, y = self.phi.astype(np.float64), self.y.astype(np.float64)
        w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
        total = w.sum()
        mean, y_mean = (
            (w @ a / total if intercept else np.zeros(a.shape[1])) for a in (phi, y)
        )
        z, t = phi - mean, y - y_mean
        gram = (z * w[:, None]).T @ z
        penalty = l2 * total
        kernel = np.linalg.solve(
            gram + penalty * np.eye(len(gram)), (z * w[:, None]).T @ t
        )
        return kernel, y_mean - mean @ kernel, penalty


@pytest.fixture
def make_problem():
    def make(n=300, m=20, o=3, *, condition=1.0, mean=1.0, noise=0.1, seed=0):
        rng = np.random.default_rng(seed)
        rotation = np.linalg.qr(rng.normal(size=(m, m)))[0]
        spread = np.geomspace(1, condition**-0.5, m)
        phi = (rng.normal(size=(n, m)) * spread) @ rotation + mean
        y = phi @ rng.normal(size=(m, o)) + noise * rng.normal(size=(n, o)) + 2
        weights = rng.uniform(0.2, 3.0, size=n)
        return Problem(*(a.astype(np.float32) for a in (phi, y, weights)))

    return make


@pytest.fixture(params=["compiled", "blas"])
def route(request, monkeypatch):
    """Both ways to gather statistics on a CPU, in several pieces of small problems."""
    wide = 1 if request.param == "blas" else 1 << 30
    sizes = {"_WIDE": wide, "_TALL": 0, "_LONGEST": 5, "_BLOCK": 25, "_CACHED": 200}
    for name, size in sizes.items():
        monkeypatch.setattr(_accumulate, name, size)
