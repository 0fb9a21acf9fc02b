"""Time that a device has nothing to do between two stages of a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Mark = TypeVar("Mark")
_NO_STAGE = -2


class Bubbles(Generic[Mark]):
    """Adds up the time from the end of a stage's work to the beginning of the next one's.

    Only passes with LS rows count: they go through the stages one after the other, whereas a stage
    of BE rows alone may have had nobody to run sooner.
    """

    def __init__(self, mark: Callable[[], Mark], ns_between: Callable[[Mark, Mark], int]) -> None:
        """mark: marks what the device has been asked to do so far; may be reached later."""
        self._mark = mark
        self._ns_between = ns_between
        self._stage = _NO_STAGE
        self._ended: Mark | None = None
        self._gaps: list[tuple[Mark, Mark]] = []
        self.total_ns = 0

    def begin(self, stage: int, in_pass: bool) -> None:
        """Called before the work of `stage`; in_pass: whether LS rows are in it."""
        if in_pass and stage == self._stage + 1 and self._ended is not None:
            self._gaps.append((self._ended, self._mark()))
        self._stage = stage if in_pass else _NO_STAGE
        self._ended = None

    def end(self) -> None:
        """Called after work of the stage that began last; the last call for it counts."""
        if self._stage != _NO_STAGE:
            self._ended = self._mark()

    def settle(self) -> None:
        """Called when all marks have been reached."""
        self.total_ns += sum(self._ns_between(*gap) for gap in self._gaps)
        self._gaps.clear()
