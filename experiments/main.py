"""Runs a config: ``python -m experiments.main --config=configs/vit_adapter.py``.

Kept short: the work is in ``experiments.runner``, which notebooks call as well.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from experiments.train import PREEMPTED_EXIT_CODE, Preempted

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe: configs/NAME.py[:ARG].", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the results; runs/NAME of the config by default."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}.")
    from experiments.runner import run

    config = _CONFIG.value
    try:
        run(config, _WORKDIR.value or f"runs/{config.name}")
    except Preempted as stopped:
        print(f"{stopped} Run the same command again to go on.", flush=True)
        sys.exit(PREEMPTED_EXIT_CODE)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
