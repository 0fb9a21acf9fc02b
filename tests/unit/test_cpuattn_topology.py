"""Exclusive cores: one NUMA node per server, and never two servers on a core."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from omniserve.cpuattn.settings import CpuAttnSettings
from omniserve.cpuattn.topology import choose_cores, numa_nodes
from omniserve.errors import SettingsError

ALLOWED = sorted(os.sched_getaffinity(0))


def host(folder: Path, **cpulists: str) -> Path:
    """A folder like /sys/devices/system/node."""
    for name, cpulist in cpulists.items():
        (folder / name).mkdir()
        (folder / name / "cpulist").write_text(cpulist + "\n")
    return folder


def exclusive(shm_dir: Path, threads: int) -> CpuAttnSettings:
    return CpuAttnSettings(cores="exclusive", threads=threads, shm_dir=shm_dir)


def test_the_numa_map_is_read_from_the_kernel(tmp_path: Path) -> None:
    folder = host(tmp_path, node0="0-2,8", node1="3-4", node2="")
    assert numa_nodes(folder) == {0: [0, 1, 2, 8], 1: [3, 4]}


def test_a_kernel_that_names_no_nodes_has_one(tmp_path: Path) -> None:
    assert numa_nodes(tmp_path / "missing") == {0: ALLOWED}


def test_shared_cores_are_not_pinned_and_not_claimed(tmp_path: Path) -> None:
    cores = choose_cores(CpuAttnSettings(shm_dir=tmp_path))
    assert cores.pinned == []
    assert not list(tmp_path.iterdir())
    assert cores.map.startswith("NUMA node ")


def test_more_exclusive_cores_than_allowed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="allowed") as refused:
        choose_cores(exclusive(tmp_path, len(ALLOWED) + 1))
    assert refused.value.field == "threads"


@pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two cores")
def test_exclusive_cores_of_two_servers_never_meet(tmp_path: Path) -> None:
    nodes = host(tmp_path, node0=",".join(map(str, ALLOWED[:2])))
    first = choose_cores(exclusive(tmp_path, 1), nodes)
    second = choose_cores(exclusive(tmp_path, 1), nodes)
    assert sorted(first.pinned + second.pinned) == ALLOWED[:2]
    with pytest.raises(SettingsError, match="not taken by other servers: 0 on NUMA node 0"):
        choose_cores(exclusive(tmp_path, 1), nodes)
    for descriptor in first.locks:  # as when its process ends
        os.close(descriptor)
    assert choose_cores(exclusive(tmp_path, 1), nodes).pinned == first.pinned


@pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two cores")
def test_a_second_server_takes_another_node_and_no_server_spans_two(tmp_path: Path) -> None:
    nodes = host(tmp_path, node0=str(ALLOWED[0]), node1=str(ALLOWED[1]))
    first = choose_cores(exclusive(tmp_path, 1), nodes)
    second = choose_cores(exclusive(tmp_path, 1), nodes)
    assert {*first.pinned, *second.pinned} == set(ALLOWED[:2])
    with pytest.raises(SettingsError, match="2 exclusive cores of one node asked for"):
        choose_cores(exclusive(tmp_path, 2), nodes)


@pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two cores")
def test_memory_is_touched_from_the_servers_cores(tmp_path: Path) -> None:
    cores = choose_cores(exclusive(tmp_path, 1))
    with cores.here():
        assert sorted(os.sched_getaffinity(0)) == cores.pinned
    assert sorted(os.sched_getaffinity(0)) == ALLOWED
