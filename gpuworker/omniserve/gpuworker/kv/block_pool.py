"""Allocator of device KV pages."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """A free list of `total` pages. Owned by the engine's loop."""

    def __init__(self, total: int, page_tokens: int) -> None:
        self.total = total
        self.page_tokens = page_tokens
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def take(self, pages: int) -> list[int]:
        """Returns `pages` page ids. The caller has made sure that they are free.

        Pages of a fresh pool come in ascending order: attention reads them in one sweep.
        """
        assert pages <= len(self._free), "taking more pages than are free"
        taken = self._free[len(self._free) - pages :]
        del self._free[len(self._free) - pages :]
        return taken[::-1]

    def give_back(self, pages: list[int]) -> None:
        """Takes every page of `pages` and empties the list."""
        self._free.extend(pages)
        pages.clear()

    def check_integrity(self, owned: Iterable[list[int]]) -> None:
        """Raises RuntimeError unless free and `owned` pages are each page exactly once."""
        seen = sorted([*self._free, *(page for pages in owned for page in pages)])
        if seen != list(range(self.total)):
            raise RuntimeError(f"device KV pages leaked or shared: {len(seen)} of {self.total}")
