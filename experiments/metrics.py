"""Metrics as JSON lines, a progress line, and files written atomically."""

import json
import pathlib
import sys
import time
from typing import Any

from tqdm import tqdm

from snnk_jax._files import write_atomic


def write_json(path: str | pathlib.Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_jsonl(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Reads JSON lines; a last line cut by a kill is left out."""
    path = pathlib.Path(path)
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricWriter:
    """Appends one JSON line a call to ``metrics.jsonl``.

    Opening it at ``step`` drops the lines after that step, which a resumed run will
    write again. TensorBoard events are written beside it where ``tensorboardX`` is
    installed.
    """

    def __init__(self, directory: str | pathlib.Path, step: int = 0):
        self._path = pathlib.Path(directory) / "metrics.jsonl"
        rows = [row for row in read_jsonl(self._path) if row["step"] <= step]
        write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self._path.open("a")
        self._board = _tensorboard(directory)

    def write(self, step: int, **values: float) -> None:
        """Writes one row."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items() if self._board else ():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board:
            self._board.close()


def _tensorboard(directory: str | pathlib.Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return SummaryWriter(str(directory))


class Progress:
    """A bar with rate and time left on a terminal, plain lines elsewhere.

    Args:
      name: what is running.
      start: first step.
      stop: last step.
      every_s: seconds between two plain lines.
      quiet: print nothing (all processes but the first).
    """

    def __init__(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        every_s: float = 30.0,
        quiet: bool = False,
    ):
        self._name, self._start, self._stop = name, start, stop
        self._every_s, self._quiet = every_s, quiet
        self._began = self._last = time.monotonic()
        self._text = ""
        self._bar = None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(total=stop, initial=start, desc=name, leave=False)

    def update(self, step: int) -> None:
        """Marks a step as done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if not self._quiet and now - self._last >= self._every_s:
            self._last = now
            rate = (step - self._start) / (now - self._began)
            left = (self._stop - step) / rate
            print(
                f"{self._name}: step {step}/{self._stop}, {rate:.2f} steps/s, "
                f"{left:.0f} s left. {self._text}",
                flush=True,
            )

    def note(self, text: str) -> None:
        """Sets what stands behind the rate."""
        self._text = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Clears the bar."""
        if self._bar is not None:
            self._bar.close()
