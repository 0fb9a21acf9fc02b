"""The parking lot: who boards, in which order, and that no row is lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.engine_states import STAGES, request

from omniserve.gpuworker.parking import ParkingLot
from omniserve.gpuworker.requests import Place, Request

ROWS = 6
NEVER = np.iinfo(np.int64).max


class Clock:
    """Ticks by one nanosecond each time it is read, so that no two rows are of one age."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


def lot_of(clock_ns: Callable[[], int], rows: int = ROWS) -> ParkingLot:
    return ParkingLot(rows, STAGES, clock_ns)


def host_request(sequence: int, server: int = 0) -> Request:
    """A request in an arena whose one output token is known but not computed."""
    made = request(f"{server}/{sequence}", Place.HOST, prompt=5, generated=1)
    made.server, made.sequence = server, sequence
    made.tokens[5] = 100 + sequence
    return made


def parked(lot: ParkingLot, count: int, server: int = 0) -> list[Request]:
    """Parks `count` requests of sequences 0, 1, ... one after the other."""
    requests = [host_request(sequence, server) for sequence in range(count)]
    for made in requests:
        lot.park(made)
    return requests


def send(lot: ParkingLot, count: int, next_stage: int) -> None:
    """Takes the oldest `count` rows through stage 0 and sends them away."""
    lot.send_away(lot.board(0, count), next_stage)


def rows_of(requests: list[Request]) -> set[int]:
    return {made.row for made in requests}


def sequences(*ids: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(ids, dtype=np.int32)


def test_a_parked_request_is_ready_at_stage_0_with_its_next_token_and_position() -> None:
    lot = lot_of(Clock())
    made = host_request(3, server=1)
    lot.park(made)
    assert lot.at_start(made.row)
    assert (lot.token[made.row], lot.position[made.row]) == (103, 5)
    assert (lot.server[made.row], lot.sequence[made.row]) == (1, 3)
    assert lot.requests[made.row] is made
    assert lot.board(0, ROWS).tolist() == [made.row]


def test_the_oldest_ready_rows_board_first_when_not_all_may() -> None:
    lot = lot_of(Clock())
    requests = parked(lot, 4)
    send(lot, 4, 2)
    for sequence in (2, 0, 3, 1):
        lot.answered(0, sequences(sequence))
    rows = [requests[i].row for i in (2, 0, 3, 1)]
    assert lot.board(2, 1).tolist() == rows[:1]
    assert lot.board(2, 2).tolist() == rows[1:3]
    assert lot.board(2, 4).tolist() == rows[3:]


def test_a_stage_boards_only_its_own_rows_and_never_more_than_allowed() -> None:
    lot = lot_of(Clock())
    requests = parked(lot, 4)
    send(lot, 1, 1)
    lot.answered(0, sequences(0))
    for allowance in (0, -1):
        nobody = lot.board(0, allowance)
        assert len(nobody) == 0
        assert nobody.dtype == np.int64
    assert lot.board(1, ROWS).tolist() == [requests[0].row]
    first = lot.board(0, 2).tolist()
    assert len(first) == 2
    assert {*first, *lot.board(0, ROWS).tolist()} == rows_of(requests[1:])


def test_a_row_whose_attention_is_away_boards_no_stage_until_it_is_answered() -> None:
    lot = lot_of(Clock())
    (made,) = parked(lot, 1)
    send(lot, 1, 1)
    assert lot.is_away(made.row)
    assert not lot.at_start(made.row)
    assert lot.away == 1
    assert all(len(lot.board(stage, ROWS)) == 0 for stage in range(STAGES))
    assert lot.answered(0, sequences(0)).tolist() == [made.row]
    assert lot.away == 0
    assert lot.board(1, ROWS).tolist() == [made.row]
    assert not lot.at_start(made.row)


def test_answers_reach_the_rows_of_their_own_server() -> None:
    lot = lot_of(Clock())
    first, second = parked(lot, 2, server=0), parked(lot, 2, server=1)
    send(lot, 4, 1)
    assert lot.answered(1, sequences(1, 0)).tolist() == [second[1].row, second[0].row]
    assert all(lot.is_away(made.row) for made in first)
    assert not any(lot.is_away(made.row) for made in second)


def test_a_held_row_boards_no_stage_and_counts_at_none() -> None:
    lot = lot_of(Clock())
    held, other = parked(lot, 2)
    lot.hold(held.row)
    assert lot.by_stage().ready.tolist() == [1, 0, 0, 0, 0]
    assert lot.board(0, ROWS).tolist() == [other.row]
    assert lot.parked == 2
    lot.remove(held)
    lot.check_integrity()


@pytest.mark.parametrize("answered", [False, True])
def test_only_a_row_that_is_ready_at_stage_0_can_be_held(answered: bool) -> None:
    lot = lot_of(Clock())
    (made,) = parked(lot, 1)
    send(lot, 1, 1)
    if answered:
        lot.answered(0, sequences(0))
    with pytest.raises(AssertionError, match="on its way"):
        lot.hold(made.row)


def test_a_row_that_is_away_can_be_evicted_but_not_removed() -> None:
    lot = lot_of(Clock())
    away, stays = parked(lot, 2)
    row = away.row
    send(lot, 1, 1)
    with pytest.raises(AssertionError, match="away"):
        lot.remove(away)
    lot.evict(away)
    assert away.row == -1
    assert lot.requests[row] is None
    assert (lot.parked, lot.away) == (1, 0)
    assert lot.board(0, ROWS).tolist() == [stays.row]
    lot.check_integrity()


def test_a_full_lot_has_room_again_once_a_request_left() -> None:
    lot = lot_of(Clock(), rows=2)
    first, _ = parked(lot, 2)
    assert not lot.has_room()
    lot.remove(first)
    assert lot.has_room()
    lot.park(first)
    assert not lot.has_room()
    lot.check_integrity()


def test_the_next_token_starts_over_at_stage_0_as_the_youngest() -> None:
    lot = lot_of(Clock())
    first, second = parked(lot, 2)
    lot.ls_stages[first.row] = 7
    assert lot.board(0, 1).tolist() == [first.row]
    lot.next_tokens(np.array([first.row]), [42], [6])
    assert (lot.token[first.row], lot.position[first.row]) == (42, 6)
    assert lot.ls_stages[first.row] == 0
    assert lot.board(0, 1).tolist() == [second.row]


def test_counts_tell_who_is_parked_where_and_since_when() -> None:
    clock = Clock()
    lot = lot_of(clock)
    parked(lot, 5)  # at 1 .. 5 ns
    send(lot, 3, 2)  # at 6 ns
    lot.answered(0, sequences(1))  # at 7 ns
    lot.answered(0, sequences(0))  # at 8 ns
    counts = lot.by_stage()
    assert counts.ready.tolist() == [2, 0, 2, 0, 0]
    assert counts.away.tolist() == [0, 0, 1, 0, 0]
    assert counts.oldest_ready_ns.tolist() == [4, NEVER, 7, NEVER, NEVER]


def test_an_empty_lot_counts_nobody() -> None:
    counts = lot_of(Clock()).by_stage()
    assert counts.ready.tolist() == counts.away.tolist() == [0] * STAGES
    assert counts.oldest_ready_ns.tolist() == [NEVER] * STAGES


def test_a_row_passed_over_in_many_passes_makes_its_stage_overdue() -> None:
    lot = lot_of(Clock())
    parked(lot, 2)
    send(lot, 1, 3)
    lot.answered(0, sequences(0))
    for _ in range(3):
        lot.end_pass()
        assert lot.by_stage().overdue == ()
    lot.end_pass()
    assert lot.by_stage().overdue == (0, 3)  # stage 0's row has waited for longer
    lot.send_away(lot.board(3, 1), 4)
    assert lot.by_stage().overdue == (0,)


def test_answers_are_timed_from_sending_and_told_apart_by_the_next_boarding() -> None:
    clock = Clock()
    lot = lot_of(clock)
    parked(lot, 2)
    send(lot, 1, 1)
    sent_ns = clock.now_ns
    clock.now_ns += 1000
    lot.answered(0, sequences(0))
    assert lot.by_stage().answer_ns == clock.now_ns - sent_ns
    in_time = lot.by_stage().in_time
    assert in_time > 0
    send(lot, 1, 1)
    lot.board(1, 1)
    lot.answered(0, sequences(1))
    assert lot.by_stage().in_time < in_time


def test_a_queue_that_goes_round_keeps_its_order() -> None:
    lot = lot_of(Clock(), rows=3)
    requests = parked(lot, 3)
    for _ in range(5):
        boarded = lot.board(0, 2)
        assert boarded.tolist() == [requests[0].row, requests[1].row]
        for made in requests[:2]:
            lot.next_tokens(np.array([made.row]), [1], [6])
        requests = [requests[2], *requests[:2]]
        lot.check_integrity()


def _forget_a_request(lot: ParkingLot, made: Request) -> None:
    lot.requests[made.row] = None


def _share_a_row(lot: ParkingLot, made: Request) -> None:
    lot.requests[(made.row + 1) % ROWS] = made


def _move_a_request(_: ParkingLot, made: Request) -> None:
    made.row += 1


@pytest.mark.parametrize("tamper", [_forget_a_request, _share_a_row, _move_a_request])
def test_a_lost_or_shared_row_fails_the_integrity_check(
    tamper: Callable[[ParkingLot, Request], None],
) -> None:
    lot = lot_of(Clock())
    made = parked(lot, 2)[0]
    lot.check_integrity()
    tamper(lot, made)
    with pytest.raises(RuntimeError, match="leaked or shared"):
        lot.check_integrity()


class ParkingMachine(RuleBasedStateMachine):
    """Any order of the engine's calls against a model: row states in plain dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.lot = lot_of(self.clock)
        self.ready: dict[Request, tuple[int, int]] = {}  # stage, since when
        self.away: dict[Request, int] = {}  # stage
        self.held: list[Request] = []
        self.sequences = 0

    def pick(self, data: st.DataObject, among: list[Request]) -> Request:
        return among[data.draw(st.integers(0, len(among) - 1))]

    @precondition(lambda self: self.lot.has_room())
    @rule(server=st.integers(0, 1))
    def park(self, server: int) -> None:
        made = host_request(self.sequences, server)
        self.sequences += 1
        self.lot.park(made)
        self.ready[made] = (0, self.clock.now_ns)

    @rule(stage=st.integers(0, STAGES - 1), allowance=st.integers(-1, ROWS + 1))
    def board(self, stage: int, allowance: int) -> None:
        waiting = {made: since for made, (at, since) in self.ready.items() if at == stage}
        oldest = sorted(waiting, key=waiting.__getitem__)[: max(allowance, 0)]
        boarded = self.lot.board(stage, allowance)
        assert set(boarded.tolist()) == rows_of(oldest)
        for made in oldest:
            del self.ready[made]
        if stage < STAGES - 1:
            self.lot.send_away(boarded, stage + 1)
            self.away |= dict.fromkeys(oldest, stage + 1)
            return
        for made in oldest:
            self.lot.next_tokens(np.array([made.row]), [1], [6])
            self.ready[made] = (0, self.clock.now_ns)

    @precondition(lambda self: self.away)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        made = self.pick(data, list(self.away))
        assert self.lot.answered(made.server, sequences(made.sequence)) == [made.row]
        self.ready[made] = (self.away.pop(made), self.clock.now_ns)

    @precondition(lambda self: any(stage == 0 for stage, _ in self.ready.values()))
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        made = self.pick(data, [made for made, (stage, _) in self.ready.items() if stage == 0])
        self.lot.hold(made.row)
        del self.ready[made]
        self.held.append(made)

    @precondition(lambda self: self.ready or self.held)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        made = self.pick(data, [*self.ready, *self.held])
        self.lot.remove(made)
        if self.ready.pop(made, None) is None:
            self.held.remove(made)

    @precondition(lambda self: self.away)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        made = self.pick(data, list(self.away))
        self.lot.evict(made)
        del self.away[made]

    @invariant()
    def counts_agree(self) -> None:
        counts = self.lot.by_stage()
        for stage in range(STAGES):
            since = [when for at, when in self.ready.values() if at == stage]
            assert counts.ready[stage] == len(since)
            assert counts.oldest_ready_ns[stage] == min(since, default=NEVER)
            assert counts.away[stage] == list(self.away.values()).count(stage)
        assert self.lot.away == len(self.away)
        assert self.lot.parked == len(self.ready) + len(self.away) + len(self.held)
        self.lot.check_integrity()


TestAnyOrderOfCalls = ParkingMachine.TestCase
TestAnyOrderOfCalls.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
