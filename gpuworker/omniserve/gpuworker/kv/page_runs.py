"""Free pages, kept as runs of consecutive ones: attention reads those in one sweep."""

from __future__ import annotations

from bisect import bisect_right
from itertools import chain


class PageRuns:
    """A sorted list of runs. All of `0 .. total - 1` are free at first."""

    def __init__(self, total: int) -> None:
        self._starts = [0] if total else []
        self._ends = [total] if total else []
        self.count = total

    def add(self, page: int) -> None:
        """Makes `page`, which is not free, free."""
        at = bisect_right(self._starts, page)
        joins_left = at > 0 and self._ends[at - 1] == page
        joins_right = at < len(self._starts) and self._starts[at] == page + 1
        if joins_left and joins_right:
            self._ends[at - 1] = self._ends[at]
            del self._starts[at], self._ends[at]
        elif joins_left:
            self._ends[at - 1] = page + 1
        elif joins_right:
            self._starts[at] = page
        else:
            self._starts.insert(at, page)
            self._ends.insert(at, page + 1)
        self.count += 1

    def take(self, pages: int, after: int = -1) -> list[int]:
        """Returns `pages` free pages, at most `count`, in runs as long as possible.

        They follow page `after` if that one's successor is free; then come the shortest run that
        suffices, or the longest ones.
        """
        taken: list[int] = []
        at = bisect_right(self._starts, after + 1) - 1
        if after >= 0 and at >= 0 and self._starts[at] == after + 1:
            taken += self._take_from(at, pages)
        while len(taken) < pages:
            missing = pages - len(taken)
            lengths = [end - start for start, end in zip(self._starts, self._ends, strict=True)]
            enough = [length for length in lengths if length >= missing]
            at = lengths.index(min(enough) if enough else max(lengths))
            taken += self._take_from(at, missing)
        return taken

    def pages(self) -> list[int]:
        """Returns all free pages, sorted."""
        runs = zip(self._starts, self._ends, strict=True)
        return list(chain.from_iterable(range(start, end) for start, end in runs))

    def _take_from(self, at: int, pages: int) -> range:
        start = self._starts[at]
        end = min(start + pages, self._ends[at])
        if end == self._ends[at]:
            del self._starts[at], self._ends[at]
        else:
            self._starts[at] = end
        self.count -= end - start
        return range(start, end)
