"""Rounds on a device that may go away: what was measured before stays.

In: how one round is measured. Out: the rounds, and why there are no more. Not here: measuring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from evals.bench.bench_conditions import Reason
from runtime.errors import PocketError

Round = TypeVar("Round")


def taken(
    count: int, measure: Callable[[int], Round], tell: Callable[[str], None]
) -> tuple[list[Round], tuple[Reason, ...]]:
    """Up to `count` rounds, and a reason if a later one failed. Raises what the first one raises."""
    found: list[Round] = []
    for number in range(count):
        try:
            found.append(measure(number))
        except PocketError as error:
            if not found:
                raise
            tell(f"round {number + 1} of {count} failed: {error}; keeping the {number} before it")
            return found, (Reason(what=f"round {number + 1} of {count}", why=str(error)),)
    return found, ()
