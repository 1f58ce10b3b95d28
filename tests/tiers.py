"""Which cases of a parametrised test wait for the slow tier."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Marks all ``values`` slow except for those in ``quick``.

    Raises:
      ValueError: for a quick case that does not exist.
    """
    values = list(values)
    if missing := [value for value in quick if value not in values]:
        raise ValueError(f"quick must be among the values. Got {missing}.")
    return [
        value if value in quick else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]
