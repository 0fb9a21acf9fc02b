"""States of KV blocks: what is allowed happens, all else is a typed error and changes nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest

from omniserve.gpuworker.kv.block_states import ALLOWED, BlockState, BlockStateError, BlockStates

LIVES = {
    "LS, or BE without a server": ["FREE", "FILLING", "RESIDENT", "FREE"],
    "a shared block": ["FREE", "RESIDENT", "FREE"],
    "BE, demoted and brought back": [
        *["FREE", "FILLING", "RESIDENT", "CHECKPOINTING", "MIRRORED", "HOST_ONLY"],
        *["FILLING", "MIRRORED", "FREE"],
    ],
    "BE, demoted and found in the cache": ["MIRRORED", "HOST_ONLY", "MIRRORED"],
    "decoded by a server": ["FREE", "HOST_ONLY", "FREE"],
    "an arena lost": ["CHECKPOINTING", "RESIDENT", "CHECKPOINTING", "MIRRORED", "RESIDENT"],
    "the last block, in part": ["FREE", "FILLING", "HOST_ONLY", "FILLING", "RESIDENT"],
}
DAMAGE = {
    "a page that others read is written": ("RESIDENT", "FILLING"),
    "a mirrored page is written": ("MIRRORED", "FILLING"),
    "a page is given up before its checkpoint is sent": ("RESIDENT", "HOST_ONLY"),
    "a page is given up before its checkpoint has arrived": ("CHECKPOINTING", "HOST_ONLY"),
    "a checkpoint of what is not computed": ("FILLING", "CHECKPOINTING"),
    "mirrored without a checkpoint": ("RESIDENT", "MIRRORED"),
}


def block(state: str) -> BlockStates:
    """One block that has come to `state` by the shortest way."""
    ways: dict[BlockState, list[BlockState]] = {BlockState.FREE: []}
    queue = [BlockState.FREE]
    for old in queue:
        for new in ALLOWED[old]:
            if new not in ways:
                ways[new] = [*ways[old], new]
                queue.append(new)
    states = BlockStates()
    first, *rest = ways[BlockState[state]]
    states.add(1, first)
    for new in rest:
        states.move(0, 1, new)
    return states


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
def test_every_way_that_a_request_takes_is_allowed(life: list[str]) -> None:
    for old, new in pairwise(BlockState[name] for name in life):
        assert new in ALLOWED[old] or new is BlockState.FREE


@pytest.mark.parametrize(("old", "new"), DAMAGE.values(), ids=DAMAGE)
def test_what_would_lose_or_spoil_kv_is_a_typed_error(old: str, new: str) -> None:
    states = block(old)
    with pytest.raises(BlockStateError, match=f"block 0 cannot go from {old} to {new}"):
        states.move(0, 1, BlockState[new])
    assert list(states) == [BlockState[old]]


def test_a_refused_change_leaves_all_blocks_as_they_were() -> None:
    states = BlockStates()
    states.add(2, BlockState.RESIDENT)
    states.add(1, BlockState.FILLING)
    with pytest.raises(BlockStateError) as refused:
        states.move(0, 3, BlockState.CHECKPOINTING)
    assert (refused.value.index, refused.value.old) == (2, BlockState.FILLING)
    assert list(states) == [BlockState.RESIDENT] * 2 + [BlockState.FILLING]


def test_a_new_block_cannot_start_as_mirrored() -> None:
    with pytest.raises(BlockStateError, match="block 0 cannot go from FREE to MIRRORED"):
        BlockStates().add(1, BlockState.MIRRORED)


def test_blocks_that_are_there_already_stay() -> None:
    states = block("MIRRORED")
    states.move(0, 1, BlockState.MIRRORED)
    assert list(states) == [BlockState.MIRRORED]
