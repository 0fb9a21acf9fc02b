"""What an attention server says at start when there is no room for its arena."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from omniserve.cpuattn import arena
from omniserve.cpuattn.arena import Arena
from omniserve.errors import SharedMemoryError

MIB = 1 << 20


@pytest.mark.parametrize("names", arena.CGROUP_FILES, ids=["version 2", "version 1"])
def test_an_arena_over_the_container_s_memory_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str]
) -> None:
    values = (64 * MIB, 32 * MIB, f"inactive_file {8 * MIB}\nactive_file {4 * MIB}\nshmem 5")
    for name, value in zip(names, values, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    monkeypatch.setattr(arena, "CGROUPS", tmp_path)
    with pytest.raises(SharedMemoryError) as refused:
        Arena(tmp_path / "a0.arena", 45 * MIB)
    assert refused.value.metadata == {
        "needed_bytes": str(45 * MIB),
        "available_bytes": str(44 * MIB),
    }
    assert "under the container's memory limit; see --arena-bytes" in refused.value.message
    assert not (tmp_path / "a0.arena").exists()
    Arena(tmp_path / "a0.arena", 43 * MIB).remove()


@pytest.mark.parametrize("again", [False, True], ids=["removed", "replaced"])
def test_a_file_that_its_last_server_removed_before_it_was_locked_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    path = tmp_path / "a0.arena"
    path.touch()
    lock = fcntl.flock
    opened: list[int] = []

    def flock(fd: int, operation: int) -> None:
        if not opened:
            path.unlink()
            if again:
                path.touch()
        opened.append(fd)
        lock(fd, operation)

    monkeypatch.setattr(arena.fcntl, "flock", flock)
    ours = Arena(path, MIB)
    assert len(opened) == 2
    assert path.stat().st_size == MIB
    with pytest.raises(SharedMemoryError, match="another running server"):
        Arena(path, MIB)
    ours.remove()


def test_without_a_limit_the_container_bounds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(arena, "CGROUPS", tmp_path)
    Arena(tmp_path / "a0.arena", MIB).remove()
