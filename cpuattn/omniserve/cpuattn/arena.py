"""The arena: a file on tmpfs that outlives a crash of its server.

All memory is claimed at start, so a full tmpfs is an error then and never a SIGBUS later. Memory
lies on the NUMA node of the cores that claim it, in huge pages where the host allows them for tmpfs
(`/sys/kernel/mm/transparent_hugepage/shmem_enabled` or the mount's `huge=`).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from omniserve.errors import SharedMemoryError

MEMINFO = Path("/proc/meminfo")
SMAPS = Path("/proc/self/smaps")
CGROUPS = Path("/sys/fs/cgroup")
# Of a container: limit, use, and what the use consists of; of version 2, and of version 1.
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
MADV_POPULATE_WRITE = 23  # of Linux 5.14; Python does not name it


class _Room(NamedTuple):
    available_bytes: int
    of_what: str


class Arena:
    """Owns the file at `path`, of `size_bytes`; a lock keeps other servers off it."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Opens the arena, or creates it. Raises SharedMemoryError."""
        self.path = path
        self.size_bytes = size_bytes
        self.huge_bytes = 0
        """Of the file, in huge pages."""
        self._fd = self._open_locked()
        try:
            self._allocate()
        except BaseException:
            os.close(self._fd)
            raise

    def _open_locked(self) -> int:
        """A file of our size, or an empty one; nobody else has it open as an arena."""
        fd = self._open()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise SharedMemoryError(f"{self.path} belongs to another running server") from error
        # The server that had it may have removed it since it was opened.
        if self._is_at_path(fd):
            if os.fstat(fd).st_size in (0, self.size_bytes):
                return fd
            # One of another size is of no use. It is replaced rather than cut: a worker may have
            # it mapped, and would get a SIGBUS.
            self._unlink()
        os.close(fd)
        return self._open_locked()

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SharedMemoryError(f"cannot open {self.path}: {error.strerror}") from error

    def _is_at_path(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _allocate(self) -> None:
        # What an adopted file has already is not needed a second time.
        needed = self.size_bytes - os.fstat(self._fd).st_blocks * 512
        room = min(_rooms(self.path.parent), key=lambda room: room.available_bytes)
        if needed > room.available_bytes:
            self._unlink()
            raise self._too_small(room)
        try:
            os.ftruncate(self._fd, self.size_bytes)
            self.huge_bytes = self._populate()
            # Whatever that left out: it is advice, and this is not.
            os.posix_fallocate(self._fd, 0, self.size_bytes)
        except OSError as error:
            self._unlink()
            raise self._too_small(room) from error

    def _populate(self) -> int:
        """Touches every page through a mapping that asks for huge ones; returns their bytes.

        Only a page fault can get huge pages where they are given on advice: fallocate cannot.
        """
        with mmap.mmap(self._fd, self.size_bytes) as mapping:
            with contextlib.suppress(OSError):
                mapping.madvise(mmap.MADV_HUGEPAGE)
                mapping.madvise(MADV_POPULATE_WRITE)
            return _huge_bytes(self.path)

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _too_small(self, room: _Room) -> SharedMemoryError:
        return SharedMemoryError(
            f"{self.path.parent} is too small: needed {self.size_bytes} bytes, "
            f"available {room.available_bytes} {room.of_what}; see --arena-bytes",
            field="arena_bytes",
            metadata={
                "needed_bytes": str(self.size_bytes),
                "available_bytes": str(room.available_bytes),
            },
        )

    def remove(self) -> None:
        """Deletes the file; what is mapped stays valid until it is unmapped."""
        self._unlink()
        os.close(self._fd)


def _huge_bytes(path: Path) -> int:
    """What of this process's mappings of the file lies in huge pages."""
    found = 0
    ours = False
    for line in SMAPS.read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # begins a mapping, and ends with its file
            ours = words[-1] == str(path.resolve())
        elif ours and words[0] == "ShmemPmdMapped:":
            found += int(words[1]) * 1024
    return found


def _rooms(folder: Path) -> Iterator[_Room]:
    """All that bounds what a file in `folder` may still take."""
    system = os.statvfs(folder)
    yield _Room(system.f_bavail * system.f_frsize, "in the file system")
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            yield _Room(int(line.split()[1]) * 1024, "in the host's memory")
    for names in CGROUP_FILES:
        limit, use, parts = (CGROUPS / name for name in names)
        # Without one there is no limit; to go over it means SIGKILL, and no error.
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            left = int(text) - int(use.read_text()) + _reclaimable_bytes(parts)
            yield _Room(max(left, 0), "under the container's memory limit")


def _reclaimable_bytes(stat: Path) -> int:
    """Copies of files on disk, which make way; memory of tmpfs is not among them."""
    parts = dict(line.split() for line in stat.read_text().splitlines())
    return int(parts["active_file"]) + int(parts["inactive_file"])
