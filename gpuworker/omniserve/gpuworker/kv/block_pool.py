"""Allocator of device KV pages, which requests may share, and the prefix cache's pages among them.

A page is held by `refs` requests, or by none. One that is named by a digest (see `prefix`) can be
found again: when its last holder gives it back it stays as it is until pages are short; then
those that were given back first go first (LRU).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from omniserve.gpuworker.kv.page_runs import PageRuns


class BlockPool:
    """`total` pages of `page_tokens` tokens each. Owned by the engine's loop."""

    def __init__(self, total: int, page_tokens: int) -> None:
        self.total = total
        self.page_tokens = page_tokens
        self._runs = PageRuns(total)
        self._refs = [0] * total
        self._digests: list[bytes | None] = [None] * total
        self._named: dict[bytes, int] = {}
        """Page by digest."""
        self._unheld: OrderedDict[int, None] = OrderedDict()
        """Named pages that nobody holds, the next to be evicted first."""

    @property
    def free(self) -> int:
        """Pages that can be taken: those that hold nothing, and those kept for a later hit."""
        return self._runs.count + len(self._unheld)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def take(self, pages: int, after: int = -1) -> list[int]:
        """Returns `pages` pages to be written. The caller has made sure that they are free.

        They come in ascending runs, the first behind page `after` if that is free.
        """
        assert pages <= self.free, "taking more pages than are free"
        while self._runs.count < pages:
            self._evict()
        taken = self._runs.take(pages, after)
        for page in taken:
            self._refs[page] = 1
        return taken

    def share(self, digest: bytes) -> int | None:
        """Returns the page named `digest`, to be read only, or None if there is none."""
        page = self._named.get(digest)
        if page is not None:
            if self._refs[page] == 0:
                del self._unheld[page]
            self._refs[page] += 1
        return page

    def name(self, page: int, digest: bytes) -> None:
        """Makes a full page findable. It stays unnamed if another one holds the same already."""
        if digest not in self._named:
            self._named[digest] = page
            self._digests[page] = digest

    def give_back(self, pages: list[int]) -> None:
        """Takes one hold of every page of `pages` and empties the list.

        Later pages are evicted before earlier ones, without which they could not be found.
        """
        for page in reversed(pages):
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if self._digests[page] is None:
                    self._runs.add(page)
                else:
                    self._unheld[page] = None
        pages.clear()

    def check_integrity(self, owned: Iterable[list[int]]) -> None:
        """Raises RuntimeError unless each page is free, kept, or held as often as in `owned`."""
        held = Counter(page for pages in owned for page in pages)
        if any(self._refs[page] != held[page] for page in range(self.total)):
            raise RuntimeError("device KV pages leaked or shared: holders do not add up")
        seen = sorted([*self._runs.pages(), *self._unheld, *held])
        if seen != list(range(self.total)):
            raise RuntimeError(f"device KV pages leaked or shared: {len(seen)} of {self.total}")
        named = {page: digest for page, digest in enumerate(self._digests) if digest is not None}
        if named != {page: digest for digest, page in self._named.items()}:
            raise RuntimeError("device KV pages and their digests do not match")
        if not self._unheld.keys() <= named.keys():
            raise RuntimeError("device KV pages are kept that nobody can find")

    def _evict(self) -> None:
        page, _ = self._unheld.popitem(last=False)
        digest = self._digests[page]
        assert digest is not None, "an unnamed page in the prefix cache"
        del self._named[digest]
        self._digests[page] = None
        self._runs.add(page)
