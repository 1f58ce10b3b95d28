"""Many small measurements in one workdir: each done once, written as it is done."""

import contextlib
import fcntl
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from experiments.metrics import Progress, read_jsonl
from experiments.report import document
from experiments.workdirs import open_workdir
from snnk_jax._files import write_atomic

Job = tuple[str, Callable[[], dict[str, Any]]]
"""A name of its own and what measures it."""

_JOBS_OF_A_CACHE = 50
"""Jobs after which compiled programs are let go.

Each keeps parts of memory mapped, of which Linux gives a process 65,530: some 500 jobs.
"""


def run_study(
    config: Any,
    workdir: str | pathlib.Path,
    command: str,
    jobs: Iterable[Job],
    report: Callable[[pathlib.Path, list[dict[str, Any]]], Sequence[str]],
) -> list[dict[str, Any]]:
    """Claims a folder, measures the jobs it has no rows of, and writes its report.

    Args:
      config: of the experiment; a folder of another config is refused.
      workdir: folder of ``rows.jsonl``, ``env.json``, ``report.md`` and the plots.
      command: shown in the report.
      jobs: as of :func:`run_jobs`; an iterator is asked for them in the claimed folder.
      report: ``report(workdir, rows)`` draws the plots and returns the report's parts.

    Returns:
      The rows in the order of the jobs.
    """
    workdir = pathlib.Path(workdir)
    environment = open_workdir(workdir, config)
    start = time.perf_counter()
    rows = run_jobs(workdir, jobs, config.name)
    document(workdir, config.name, command, report(workdir, rows), environment)
    print(f"{time.perf_counter() - start:.0f} s. Report: {workdir / 'report.md'}")
    return rows


def run_jobs(
    workdir: str | pathlib.Path, jobs: Iterable[Job], title: str
) -> list[dict[str, Any]]:
    """Runs every job that ``workdir/rows.jsonl`` does not hold yet.

    A row is appended as soon as it is measured, so a killed run goes on where it was
    stopped.

    Args:
      workdir: an existing folder, claimed by :func:`experiments.workdirs.claim`.
      jobs: names, each its own, and functions without arguments that return a row.
      title: shown beside the progress.

    Returns:
      The rows in the order of the jobs, each with its ``name``.

    Raises:
      ValueError: for two jobs of one name, or if another process writes to the folder.
    """
    todo = list(jobs)
    names = [name for name, _ in todo]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"jobs must have names of their own. Got {twice} twice.")
    file = pathlib.Path(workdir) / "rows.jsonl"
    rows = []
    with _alone(file):
        done = {row["name"]: row for row in read_jsonl(file)}
        # Without the line that a kill cut short, which would swallow the next one.
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in done.values()))
        progress = Progress(title, 0, len(todo))
        measured = 0
        with file.open("a") as stream:
            for step, (name, measure) in enumerate(todo):
                if name not in done:
                    done[name] = {"name": name, **measure()}
                    stream.write(json.dumps(done[name]) + "\n")
                    stream.flush()
                    measured += 1
                    if measured % _JOBS_OF_A_CACHE == 0:
                        jax.clear_caches()
                rows.append(done[name])
                progress.update(step + 1)
        progress.close()
    return rows


@contextlib.contextmanager
def _alone(file: pathlib.Path) -> Iterator[None]:
    """Holds a lock beside a file, which the system lets go when the process ends."""
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"workdir must be that of one process at a time. Got {file.parent}, "
                "to which another one writes."
            ) from error
        except OSError:
            pass  # a file system without locks, of a mounted drive say
        yield
