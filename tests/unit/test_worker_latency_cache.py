"""Measured profiles on disk: found again, never trusted, and a log of what they predicted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.engine_states import PROFILE

from omniserve.gpuworker.iteration_log import IterationLog
from omniserve.gpuworker.latency_cache import ProfileKey, cached
from omniserve.gpuworker.latency_model import Regime
from omniserve.gpuworker.plan import Plan
from omniserve.latency import LatencyProfile

KEY = ProfileKey("a cpu", (30, 576), "bfloat16", 2, "v4")


class Measuring:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> LatencyProfile:
        self.times += 1
        return PROFILE


def trusted(_profile: LatencyProfile) -> bool:
    return False


def test_only_the_first_start_measures(tmp_path: Path) -> None:
    measure = Measuring()
    for _ in range(3):
        assert cached(tmp_path / "new folder", KEY, measure, trusted) == PROFILE
    assert measure.times == 1


def test_a_profile_of_a_busier_host_is_measured_again(tmp_path: Path) -> None:
    measure = Measuring()
    cached(tmp_path, KEY, measure, trusted)
    doubted: list[LatencyProfile] = []

    def doubt(profile: LatencyProfile) -> bool:
        doubted.append(profile)
        return True

    assert cached(tmp_path, KEY, measure, doubt) == PROFILE
    assert doubted == [PROFILE]
    assert measure.times == 2


@pytest.mark.parametrize(
    "change", [{"threads": 1}, {"dtype": "float32"}, {"kernel": "v3"}, {"hardware": "b"}]
)
def test_another_kind_of_machine_measures_for_itself(
    tmp_path: Path, change: dict[str, object]
) -> None:
    measure = Measuring()
    cached(tmp_path, KEY, measure, trusted)
    cached(tmp_path, dataclasses.replace(KEY, **change), measure, trusted)  # type: ignore[arg-type]
    assert measure.times == 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": 3}', b"\xff\xfe"])
def test_a_broken_file_is_measured_again_and_overwritten(
    tmp_path: Path, content: str | bytes
) -> None:
    path = tmp_path / KEY.file_name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    measure = Measuring()
    for _ in range(2):
        assert cached(tmp_path, KEY, measure, trusted) == PROFILE
    assert measure.times == 1
    assert [p.name for p in tmp_path.iterdir()] == [KEY.file_name]


def test_a_file_of_another_kind_under_this_name_is_overwritten(tmp_path: Path) -> None:
    measure = Measuring()
    other = dataclasses.replace(KEY, hardware="elsewhere")
    cached(tmp_path, other, measure, trusted)
    (tmp_path / other.file_name).rename(tmp_path / KEY.file_name)
    cached(tmp_path, KEY, measure, trusted)
    assert measure.times == 2
    assert json.loads((tmp_path / KEY.file_name).read_text())["key"]["hardware"] == "a cpu"


def test_a_folder_that_cannot_be_made_costs_only_the_measuring(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    measure = Measuring()
    assert cached(occupied / "folder", KEY, measure, trusted) == PROFILE


def test_iterations_are_written_oldest_first(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = IterationLog(str(path))
    for number in range(3):
        plan = Plan(range(2), regime=Regime.BOARDING, rows=number, predicted_ns=10.0)
        log.begin(plan, decided_ns=100 + number, decision_ns=7)
        log.end(measured_ns=20, cut_short=number == 2)
    log.write()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["rows"] for line in lines] == [0, 1, 2]
    assert [line["cut_short"] for line in lines] == [False, False, True]
    assert lines[0] == {
        "decided_ns": 100,
        "decision_ns": 7,
        "regime": "boarding",
        "rows": 0,
        "stages": 2,
        "predicted_ns": 10.0,
        "measured_ns": 20,
        "cut_short": False,
    }


def test_without_a_path_nothing_is_kept_or_written() -> None:
    log = IterationLog("")
    log.begin(Plan(range(2)), decided_ns=1, decision_ns=1)
    log.end(measured_ns=20, cut_short=False)
    log.write()
