"""Checks of arguments that modules of several folders share."""

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
