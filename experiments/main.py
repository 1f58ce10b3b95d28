"""Runs a config: ``python -m experiments.main --config=configs/vit_adapter.py``.

Kept short: the work is in ``experiments.runner``, which notebooks call as well.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.train import PREEMPTED_EXIT_CODE, Preempted

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe: configs/NAME.py[:ARG].", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the results; runs/NAME of the config by default."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Call jax.distributed.initialize() first (several hosts)."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    # Orbax narrates every save at INFO.
    logging.set_verbosity(logging.WARNING)
    import jax

    from experiments.config import experiment_of

    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    config = _CONFIG.value
    workdir = _WORKDIR.value or f"runs/{config.name}"
    try:
        experiment_of(config).run(
            config, workdir, command=f"python -m experiments.main {_arguments()}"
        )
    except Preempted as stopped:
        print(f"{stopped} Run the same command again to go on.", flush=True)
        sys.exit(PREEMPTED_EXIT_CODE)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        # What a user can mend is said in one line, without a traceback.
        sys.exit(f"error: {error}")


def _arguments() -> str:
    return " ".join(sys.argv[1:])


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
