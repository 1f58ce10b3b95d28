"""Writes golden/infinite_kernels.json: dense kernels in 40 digits, by mpmath.

Run ``python -m tests.infinite.kernel_golden`` where mpmath is installed. Inputs are
single-precision numbers, so that one file serves both precisions.
"""

import json
import pathlib

import mpmath as mp
import numpy as np

mp.mp.dps = 40
PATH = pathlib.Path(__file__).parent.parent / "golden" / "infinite_kernels.json"
W_STD, DIM = 1.5, 5


def arc(n, t):
    s, c, rest = mp.sin(t), mp.cos(t), mp.pi - t
    if n == 0:
        return rest
    if n == 1:
        return s + rest * c
    if n == 2:
        return 3 * s * c + rest * (1 + 2 * c * c)
    return 4 * s**3 + 15 * s * c * c + rest * (9 * c + 6 * c**3)


def rectified(n, left, right):
    def dual(p, q, r):
        if p == 0 or r == 0:
            return mp.mpf(0), mp.mpf(0)
        rho = max(min(q / mp.sqrt(p * r), mp.mpf(1)), mp.mpf(-1))
        t = mp.acos(rho)

        def k(n, left, right):
            same, cross = left**2 + right**2, 2 * left * right
            scale = mp.sqrt(p * r) ** n / (2 * mp.pi)
            return scale * (same * arc(n, t) + cross * arc(n, mp.pi - t))

        return k(n, left, right), n**2 * k(n - 1, -left, right) if n else mp.mpf(0)

    return dual


def erf(a, b, c):
    a, b, c = mp.mpf(a), mp.mpf(b), mp.mpf(c)

    def dual(p, q, r):
        p, q, r = (b**2 * v for v in (p, q, r))
        size = (1 + 2 * p) * (1 + 2 * r)
        k = a**2 * 2 / mp.pi * mp.asin(2 * q / mp.sqrt(size)) + c**2
        return k, a**2 * b**2 * 4 / (mp.pi * mp.sqrt(size - 4 * q**2))

    return dual


def gelu(p, q, r):
    volume = (1 + p) * (1 + r)
    root = mp.sqrt(volume - q**2)
    turn = mp.mpf(1) / 4 + mp.atan2(q, root) / (2 * mp.pi)
    k = q * turn + (q**2 + p * r * root**2) / (2 * mp.pi * volume * root)
    inside = 1 / root**2 + (1 - p * r) / volume + 1
    return k, turn + q / (2 * mp.pi * root) * inside


def sine(a, b, c):
    a, b, c = mp.mpf(a), mp.mpf(b), mp.mpf(c)

    def dual(p, q, r):
        p, q, r = (b**2 * v for v in (p, q, r))
        near, far = mp.exp(q - (p + r) / 2), mp.exp(-q - (p + r) / 2)
        turn = mp.cos(2 * c)
        return a**2 / 2 * (near - turn * far), a**2 * b**2 / 2 * (near + turn * far)

    return dual


def exponential(p, q, r):
    k = mp.exp((p + r) / 2 + q)
    return k, k


def gaussian(p, q, r):
    b = -mp.mpf(1) / 2
    volume = (1 - 2 * b * p) * (1 - 2 * b * r) - 4 * b**2 * q**2
    return 1 / mp.sqrt(volume), 4 * b**2 * q / volume ** mp.mpf(1.5)


def gabor(p, q, r):
    both, area = p + r, 4 * (p * r - q * q)
    m = 2 * both + area + 1
    decay = mp.exp(-(both + area + 2 * q) / (2 * m))
    k = decay * mp.expm1(2 * q / m) / (2 * mp.sqrt(m))
    s = 1 + 2 * both + 4 * (q * q + p * r)
    t = 4 * q * (area + 3 * both + 2)
    kdot = decay * ((s - t) + mp.exp(2 * q / m) * (s + t)) / (2 * m ** mp.mpf(2.5))
    return k, kdot


def series(coefficients):
    def row(degree, v):
        return mp.fsum(
            mp.mpf(c)
            * mp.factorial(n)
            * v ** ((n - degree) // 2)
            / (2 ** ((n - degree) // 2) * mp.factorial((n - degree) // 2))
            / mp.sqrt(mp.factorial(degree))
            for n, c in enumerate(coefficients)
            if n >= degree and (n - degree) % 2 == 0
        )

    def dual(p, q, r):
        terms = [row(j, p) * row(j, r) for j in range(len(coefficients))]
        k = mp.fsum(term * q**j for j, term in enumerate(terms))
        kdot = mp.fsum(j * term * q ** (j - 1) for j, term in enumerate(terms) if j)
        return k, kdot

    return dual


def normalized(p, q, r):
    fall = mp.exp(q / mp.sqrt(p * r) - 1)
    return mp.sqrt(p * r) * fall, fall


SCALE = 1 / 2.4020563531719796
FORMS = {
    "relu": rectified(1, 0, 1),
    "leaky_relu": rectified(1, -mp.mpf(0.01), 1),
    "abs": rectified(1, 1, 1),
    "sign": rectified(0, -1, 1),
    "step": rectified(0, 0, 1),
    "rectified_monomial": rectified(2, 0, 1),
    "erf": erf(1, 1, 0),
    "sigmoid_like": erf(0.5, SCALE, 0.5),
    "normal_cdf": erf(0.5, mp.sqrt(0.5), 0.5),
    "gelu": gelu,
    "sin": sine(1, 1, 0),
    "cos": sine(1, 1, mp.pi / 2),
    "rbf": sine(mp.sqrt(2), 1, mp.pi / 4),
    "exp": exponential,
    "gaussian": gaussian,
    "gabor": gabor,
    "identity": series([0, 1]),
    "monomial": series([0, 0, 1]),
    "polynomial": series([0.5, -1.0, 0.25]),
    "hermite": series([0, -3 / np.sqrt(6), 0, 1 / np.sqrt(6)]),
    "normalized_exponential": normalized,
}
# Values, or their conditioning, outgrow the precisions elsewhere.
SMALL = ("exp", "monomial", "polynomial", "hermite", "rectified_monomial")


def network(form, x, y, depth, b_std):
    x, y = ([mp.mpf(float(v)) for v in z] for z in (x, y))
    p, q, r = (mp.fdot(a, b) / DIM for a, b in ((x, x), (x, y), (y, y)))
    w, b = mp.mpf(W_STD) ** 2, mp.mpf(b_std) ** 2
    theta = mp.mpf(0)
    for layer in range(depth + 1):
        p, q, r = (w * v + b for v in (p, q, r))
        theta = q + w * theta
        if layer < depth:
            k, kdot = form(p, q, r)
            theta *= kdot
            p, q, r = form(p, p, p)[0], k, form(r, r, r)[0]
    # The diagonal entries, for the scale of an error.
    return q, theta, p, r


def main():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((2, DIM))
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    noise = rng.standard_normal((3, DIM))
    rows = np.stack(
        [
            *(base[0], base[1], base[0] + base[1], base[0], -base[0]),
            *(base[0] + 1e-3 * noise[0], base[0] + 1e-6 * noise[1]),
            -base[0] + 1e-5 * noise[2],
        ]
    ).astype(np.float32)
    cases = []

    def add(name, depth, b_std, scale, rows):
        x = (rows * np.float32(scale)).astype(np.float32)
        values = [network(FORMS[name], x[0], y, depth, b_std) for y in x]
        own = [network(FORMS[name], y, y, depth, b_std)[:2] for y in x]
        cases.append(
            {
                "activation": name,
                "depth": depth,
                "b_std": b_std,
                "x": x.astype(float).tolist(),
                "nngp": [float(v[0]) for v in values],
                "ntk": [float(v[1]) for v in values],
                "nngp_diagonal": [float(v[0]) for v in own],
                "ntk_diagonal": [float(v[1]) for v in own],
            }
        )

    for name in FORMS:
        for scale in (1e-3, 1.0, 1e3):
            for depth in (1, 2, 4):
                if not (name in SMALL and (scale > 1 or depth > 2)):
                    add(name, depth, 0.25, scale, rows[:3])
    for name in ("relu", "leaky_relu", "abs"):
        for depth in (1, 2, 3, 5, 10):
            for b_std in (0.0, 0.25):
                add(name, depth, b_std, 1.0, rows)
    text = json.dumps({"w_std": W_STD, "cases": cases}, indent=0)
    PATH.write_text(text + "\n")


if __name__ == "__main__":
    main()
