"""Checks of arguments that modules of several folders share."""

import math
import numbers
import operator
import re
from typing import Any


def check_size(what: str, value: Any) -> int:
    """Returns a whole number of at least 1 as an ``int``; True and 2.0 are none.

    Raises:
      ValueError: for anything else.
    """
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if size < 1 or isinstance(value, bool):
        raise ValueError(f"{what} must be a whole number of at least 1. Got {value!r}.")
    return size


def is_real(value: Any) -> bool:
    """Whether a value is a real number, of Python or NumPy; True is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_number(what: str, value: Any) -> float:
    """Returns a finite real number as a ``float``; True is none.

    Raises:
      ValueError: for anything else.
    """
    if not is_real(value) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number. Got {value!r}.")
    return float(value)


def check_pattern(what: str, pattern: Any) -> re.Pattern[str]:
    """Compiles a regular expression.

    Raises:
      ValueError: if it is none.
    """
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{what} must be a regular expression. Got {pattern!r}: {error}."
        ) from error
