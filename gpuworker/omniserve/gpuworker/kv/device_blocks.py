"""The device KV of all requests: which pages they hold, and the states of their blocks.

Called by `lifecycle`. With the prefix cache, a request that starts or comes back to the device
shares the pages of the longest known prefix of its tokens. Blocks are entered when they are full,
in prefill and in decode, unless their KV is inexact: restored from, or computed with attention
over, an arena of lower precision than the device's.
"""

from __future__ import annotations

from collections.abc import Iterable

from omniserve.gpuworker.kv.block_pool import BlockPool
from omniserve.gpuworker.kv.block_states import BlockState, BlockStateError
from omniserve.gpuworker.kv.prefix import block_digest, root_digest
from omniserve.gpuworker.requests import Place, Request


class DeviceBlocks:
    """Owned by the engine's loop. Every change of a request's blocks goes through here."""

    def __init__(
        self, pages: int, page_tokens: int, kv_dtype: str, *, prefix_cache: bool, exact_host: bool
    ) -> None:
        """exact_host: whether the arenas keep KV as precisely as the device, in `kv_dtype`."""
        self._pool = BlockPool(pages, page_tokens)
        self._kv_dtype = kv_dtype
        self._prefix_cache = prefix_cache
        self._exact_host = exact_host

    @property
    def free(self) -> int:
        """Pages that can be taken, those that only the prefix cache keeps among them."""
        return self._pool.free

    def fits(self, tokens: int) -> bool:
        return self._pool.pages_for(tokens) <= self._pool.free

    def start(self, request: Request, tokens: int) -> None:
        """Gives `request` pages for `tokens` tokens; `computed` starts behind the known prefix.

        At least one known token is left to compute, for its logits.
        """
        shared = self._share(request, request.known - 1)
        request.computed = len(shared) * self._pool.page_tokens
        request.exact = True
        request.states.add(len(shared), BlockState.RESIDENT)
        self._hold(request, shared, tokens)

    def grow(self, request: Request) -> None:
        """Takes one more page."""
        self._hold(request, request.blocks, (len(request.blocks) + 1) * self._pool.page_tokens)

    def computed_to(self, request: Request, tokens: int) -> None:
        """The KV of the first `tokens` tokens is complete; pages are read-only once full."""
        before, full = (t // self._pool.page_tokens for t in (request.computed, tokens))
        request.computed = tokens
        if full > before:
            request.states.move(before, full, BlockState.RESIDENT)
            self._enter(request, before, full)

    def sent_to(self, request: Request, tokens: int) -> None:
        """CHECKPOINT messages of the first `tokens` tokens are on their way."""
        before, full = (t // self._pool.page_tokens for t in (request.mirrored_sent, tokens))
        request.mirrored_sent = tokens
        request.states.move(before, full, BlockState.CHECKPOINTING)

    def mirrored_to(self, request: Request, tokens: int) -> None:
        """The arena has the first `tokens` tokens in every layer."""
        before, full = (t // self._pool.page_tokens for t in (request.mirrored, tokens))
        request.mirrored = tokens
        request.states.move(before, full, BlockState.MIRRORED)

    def lost_by_server(self, request: Request) -> None:
        """The arena is gone: what the device has is all there is."""
        request.states.move(0, request.computed // self._pool.page_tokens, BlockState.RESIDENT)

    def demote(self, request: Request) -> None:
        """Gives up the pages. Raises BlockStateError unless the arena has every computed token."""
        states = request.states
        if request.mirrored < request.computed:
            lacking = request.mirrored // self._pool.page_tokens
            raise BlockStateError(lacking, states[lacking], BlockState.HOST_ONLY)
        states.cut(self._pool.pages_for(request.computed))  # a page for the next token is empty
        states.move(0, len(states), BlockState.HOST_ONLY)
        self._pool.give_back(request.blocks)

    def hosted_to(self, request: Request, tokens: int) -> None:
        """A server has appended the KV of the tokens before `tokens`."""
        request.computed = request.mirrored_sent = request.mirrored = tokens
        added = self._pool.pages_for(tokens) - len(request.states)
        request.states.add(added, BlockState.HOST_ONLY)

    def promote(self, request: Request) -> None:
        """Takes pages for the KV of a parked request; `restored` starts behind what is known."""
        shared = self._share(request, request.computed)
        request.restored = len(shared) * self._pool.page_tokens
        request.exact = self._exact_host or request.restored == request.computed
        request.states.move(0, len(shared), BlockState.MIRRORED)
        request.states.move(len(shared), len(request.states), BlockState.FILLING)
        self._hold(request, shared, request.known + 1)

    def promoted(self, request: Request) -> None:
        """All that was asked for by RESTORE has come."""
        full = request.computed // self._pool.page_tokens
        request.states.move(0, full, BlockState.MIRRORED)
        self._enter(request, 0, full)

    def release(self, request: Request) -> None:
        """Gives back whatever `request` holds."""
        request.states.cut(0)
        self._pool.give_back(request.blocks)

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises RuntimeError if a page leaked or a block is not in the state it should be in."""
        requests = list(requests)
        self._pool.check_integrity(r.blocks for r in requests)
        for request in requests:
            states = list(request.states)
            if len(states) != self._blocks_expected(request) or not all(
                state in self._expected(request, index) for index, state in enumerate(states)
            ):
                names = " ".join(state.name for state in states)
                raise RuntimeError(
                    f"request {request.request_id}, {request.place.name}, {request.computed} "
                    f"tokens computed, {request.mirrored_sent} sent, {len(request.blocks)} pages: "
                    f"blocks are {names or 'FREE'}"
                )

    # --- internals -----------------------------------------------------------------------

    def _hold(self, request: Request, blocks: list[int], tokens: int) -> None:
        """`request` holds `blocks` and as many more pages as `tokens` tokens need."""
        missing = self._pool.pages_for(tokens) - len(blocks)
        last = blocks[-1] if blocks else -1
        request.blocks = blocks + self._pool.take(missing, last)
        request.states.add(len(request.blocks) - len(request.states), BlockState.FILLING)

    def _share(self, request: Request, tokens: int) -> list[int]:
        """Returns the pages of the longest known prefix of at most `tokens` tokens."""
        shared: list[int] = []
        if self._prefix_cache:
            for index in range(tokens // self._pool.page_tokens):
                page = self._pool.share(self._digest(request, index))
                if page is None:
                    break
                shared.append(page)
        return shared

    def _enter(self, request: Request, first: int, end: int) -> None:
        """Makes the full blocks `first .. end - 1` findable if their KV is exact."""
        if self._prefix_cache and request.exact:
            for index in range(first, end):
                self._pool.name(request.blocks[index], self._digest(request, index))

    def _digest(self, request: Request, index: int) -> bytes:
        """Returns the digest of a block whose tokens are known; each is computed once."""
        digests, page = request.digests, self._pool.page_tokens
        while len(digests) <= index:
            parent = digests[-1] if digests else root_digest(request.tenant, self._kv_dtype)
            start = len(digests) * page
            digests.append(block_digest(parent, request.tokens[start : start + page]))
        return digests[index]

    def _blocks_expected(self, request: Request) -> int:
        return (
            self._pool.pages_for(request.computed)
            if request.place is Place.HOST
            else len(request.blocks)
        )

    def _expected(self, request: Request, index: int) -> tuple[BlockState, ...]:
        """States that block `index` may be in, by how far its request has come."""
        end = (index + 1) * self._pool.page_tokens
        if request.place is Place.HOST:
            return (BlockState.HOST_ONLY,)
        if end > request.computed:
            return (BlockState.FILLING,)
        if request.place is Place.RESTORING:
            return (BlockState.FILLING, BlockState.MIRRORED)
        if end <= request.mirrored:
            return (BlockState.MIRRORED,)
        return (BlockState.CHECKPOINTING if end <= request.mirrored_sent else BlockState.RESIDENT,)
