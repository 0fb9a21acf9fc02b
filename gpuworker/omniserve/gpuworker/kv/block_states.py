"""The states of a request's KV blocks, and the changes between them that are allowed.

A block is the KV of `page_tokens` consecutive tokens of one request. A page of the device may be
part of several requests (`block_pool`), its states are those of each of them: one may have it
mirrored in its arena, another not yet.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator


class BlockState(enum.Enum):
    """Where the KV of a block is."""

    FREE = enum.auto()
    """Nowhere: the request has not come to it, or has given it back."""
    FILLING = enum.auto()
    """In a device page of its own that some of its tokens are still to be written to."""
    RESIDENT = enum.auto()
    """Full, in a device page and nowhere else. The page may be shared and is read-only."""
    CHECKPOINTING = enum.auto()
    """As RESIDENT; all of it was sent to the arena."""
    MIRRORED = enum.auto()
    """In a device page and, in every layer, in the arena: the page can be given up."""
    HOST_ONLY = enum.auto()
    """In the arena alone."""


_FREE, _FILLING, _RESIDENT = BlockState.FREE, BlockState.FILLING, BlockState.RESIDENT
_CHECKPOINTING, _MIRRORED = BlockState.CHECKPOINTING, BlockState.MIRRORED
_HOST_ONLY = BlockState.HOST_ONLY

ALLOWED: dict[BlockState, frozenset[BlockState]] = {
    # A page is taken; a page of the prefix cache is shared; a server appends to a new block.
    _FREE: frozenset({_FILLING, _RESIDENT, _HOST_ONLY}),
    # The last token comes; the last restored token comes; a block in part leaves with its request.
    _FILLING: frozenset({_RESIDENT, _MIRRORED, _HOST_ONLY, _FREE}),
    _RESIDENT: frozenset({_CHECKPOINTING, _FREE}),
    # The server has it; the server lost its arena.
    _CHECKPOINTING: frozenset({_MIRRORED, _RESIDENT, _FREE}),
    # Demotion; the server lost its arena.
    _MIRRORED: frozenset({_HOST_ONLY, _RESIDENT, _FREE}),
    # Promotion: its KV is asked for; its KV is found in the prefix cache.
    _HOST_ONLY: frozenset({_FILLING, _MIRRORED, _FREE}),
}


class BlockStateError(RuntimeError):
    """A block was to change to a state that its own does not allow: a bug in the engine."""

    def __init__(self, index: int, old: BlockState, new: BlockState) -> None:
        super().__init__(f"block {index} cannot go from {old.name} to {new.name}")
        self.index = index
        self.old = old
        self.new = new


class BlockStates:
    """States of one request's blocks in the order of their tokens; all behind them are FREE."""

    __slots__ = ("_states",)

    def __init__(self) -> None:
        self._states: list[BlockState] = []

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[BlockState]:
        return iter(self._states)

    def __getitem__(self, index: int) -> BlockState:
        return self._states[index]

    def add(self, blocks: int, state: BlockState) -> None:
        """The next `blocks` leave FREE."""
        if blocks > 0 and state not in ALLOWED[_FREE]:
            raise BlockStateError(len(self), _FREE, state)
        self._states.extend([state] * blocks)

    def move(self, first: int, end: int, state: BlockState) -> None:
        """Blocks `first .. end - 1` change to `state`; those that are there already stay.

        Raises BlockStateError, and changes none, if one may not.
        """
        for index in range(first, end):
            old = self._states[index]
            if old is not state and state not in ALLOWED[old]:
                raise BlockStateError(index, old, state)
        self._states[first:end] = [state] * max(0, end - first)

    def cut(self, blocks: int) -> None:
        """All but the first `blocks` go back to FREE."""
        del self._states[blocks:]
