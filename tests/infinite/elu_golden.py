"""Writes golden/infinite_elu.json: duals of ELU and SELU by quadrature in mpmath.

Run ``python -m tests.infinite.elu_golden`` where mpmath is installed. One variable is
integrated out in closed form; the other by Gauss-Legendre panels that shrink towards 0.
"""

import functools
import json
import pathlib

import mpmath as mp
import numpy as np

from tests.infinite import kernel_golden

PATH = pathlib.Path(__file__).parent.parent / "golden" / "infinite_elu.json"
CONSTANTS = {
    "elu": (mp.mpf(1), mp.mpf(1)),
    "selu": (
        mp.mpf("1.0507009873554804934193349852946"),
        mp.mpf("1.6732632423543772848170429916717"),
    ),
}
NORMS = (1e-3, 1.0, 30.0, 1e3)
RHO = (0.0, 0.5, -0.5, 0.97, -0.97, 1 - 1e-6, 1e-6 - 1, 1.0, -1.0)
EDGES = np.concatenate([[0.0], 2.0 ** np.arange(-16, 0), np.arange(1.0, 12.0)])
NODES, WEIGHTS = np.polynomial.legendre.leggauss(20)


def normal(z):
    return mp.erfc(-z / mp.sqrt(2)) / 2


def panels():
    half = np.diff(EDGES)[:, None] / 2
    g = ((EDGES[1:] + EDGES[:-1])[:, None] / 2 + half * NODES).ravel()
    weights = (half * WEIGHTS).ravel()
    for position, weight in zip(g, weights, strict=True):
        for sign in (1, -1):
            x = sign * mp.mpf(float(position))
            yield x, mp.mpf(float(weight)) * mp.npdf(x)


def dual(name):
    scale, alpha = CONSTANTS[name]

    def value(z):
        return z if z > 0 else alpha * mp.expm1(z)

    def slope(z):
        return mp.mpf(1) if z > 0 else alpha * mp.exp(z)

    def mean(m, spread):
        """Of the function and of its derivative at N(m, spread^2)."""
        if spread == 0:
            return value(m), slope(m)
        z = m / spread
        decay = mp.exp(m + spread**2 / 2) * normal(-z - spread)
        positive = m * normal(z) + spread * mp.npdf(z)
        return positive + alpha * (decay - normal(-z)), normal(z) + alpha * decay

    @functools.cache
    def k(p, q, r):
        s, t = mp.sqrt(p), mp.sqrt(r)
        rho = q / (s * t)
        gap = 1 - rho**2
        spread = t * mp.sqrt(gap) if gap > mp.mpf(10) ** -20 else mp.mpf(0)
        first, second = [], []
        for g, weight in panels():
            f, df = mean(rho * t * g, spread)
            first.append(weight * value(s * g) * f)
            second.append(weight * slope(s * g) * df)
        return scale**2 * mp.fsum(first), scale**2 * mp.fsum(second)

    return k


def main():
    mp.mp.dps = 30
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, kernel_golden.DIM))
    x = np.stack([*x, -x[0]]).astype(np.float32)
    pairs, networks = [], []
    for name in CONSTANTS:
        form = dual(name)
        for i, s in enumerate(NORMS):
            for t in NORMS[: i + 1]:
                for rho in RHO:
                    p, r = mp.mpf(s) ** 2, mp.mpf(t) ** 2
                    own = [form(v, v, v) for v in (p, r)]
                    values = form(p, mp.mpf(rho) * mp.mpf(s) * mp.mpf(t), r)
                    sizes = [mp.sqrt(own[0][j] * own[1][j]) for j in (0, 1)]
                    row = [*map(float, (*values, *sizes))]
                    pairs.append([name, s, t, rho, *row])
        for scale in (1e-3, 1.0, 1e3):
            inputs = (x * np.float32(scale)).astype(np.float32)
            rows = [
                kernel_golden.network(form, inputs[0], y, 4, 0.25)[:2] for y in inputs
            ]
            own = [kernel_golden.network(form, y, y, 4, 0.25)[:2] for y in inputs]
            networks.append(
                {
                    "activation": name,
                    "x": inputs.astype(float).tolist(),
                    "values": np.array(rows, float).tolist(),
                    "own": np.array(own, float).tolist(),
                }
            )
            print(name, scale, flush=True)
    text = json.dumps({"pairs": pairs, "networks": networks})
    PATH.write_text(text.replace("], [", "],\n[") + "\n")


if __name__ == "__main__":
    main()
