"""Makes tests/golden/projections.json; run it only when the generator changes.

The command: ``python -m tests.projections_golden``.
"""

import json
import pathlib

import jax
import numpy as np

from snnk_jax import projections

PATH = pathlib.Path(__file__).parent / "golden" / "projections.json"
SEEDS = (0, 7, 2**31 + 5)


def make_golden() -> dict:
    """Bits and some floats of the projections, for a few keys."""
    entries = []
    for seed in SEEDS:
        key = jax.random.wrap_key_data(np.array([seed // 3, seed], np.uint32))
        words = projections.key_words(key)
        entry = {
            "words": words.tolist(),
            "bits": projections.random_bits(words, 8).tolist(),
            "normals": projections.normals(words, (9,)).tolist(),
        }
        for name in projections.names():
            entry[name] = projections.draw(name, key, 5, 3).tolist()
        entries.append(entry)
    return {
        "made_by": "python -m tests.projections_golden",
        "generator": projections.GENERATOR,
        "entries": entries,
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(make_golden(), indent=1) + "\n")
    print(PATH)
