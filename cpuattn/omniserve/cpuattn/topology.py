"""Which cores the hot loop's threads run on, and whose they are.

Exclusive cores of one server lie on one NUMA node, so that its arena is near all of its threads. A
lock file per core in the folder of arenas keeps servers of one host off each other's cores; the
kernel drops the lock with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omniserve.cpuattn.settings import CpuAttnSettings
from omniserve.errors import SettingsError, SharedMemoryError

NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class Cores:
    """What a server may run on. Locks are held until the process ends."""

    pinned: list[int]
    """Core of each thread; empty when threads are not pinned."""
    nodes: dict[int, list[int]]
    """Cores of every NUMA node of the host."""
    locks: list[int]
    """Descriptors of the locked files of `pinned`."""

    @property
    def map(self) -> str:
        """One line for operators, like `NUMA node 0: cores 0 1* 2* 3, * = this server's`."""
        nodes = (
            f"NUMA node {node}: cores "
            + " ".join(f"{core}*" if core in self.pinned else str(core) for core in cores)
            for node, cores in self.nodes.items()
        )
        return "; ".join(nodes) + (", * = this server's" if self.pinned else "")

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Runs the calling thread on the server's cores: memory it touches first lies near them."""
        before = os.sched_getaffinity(0)
        if self.pinned:
            os.sched_setaffinity(0, self.pinned)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def choose_cores(settings: CpuAttnSettings, nodes_folder: Path = NODES) -> Cores:
    """Claims the cores of `settings.threads` threads. Raises SettingsError, SharedMemoryError."""
    nodes = numa_nodes(nodes_folder)
    if settings.cores == "shared":
        return Cores([], nodes, [])
    allowed = os.sched_getaffinity(0)
    usable = {node: [c for c in cores if c in allowed] for node, cores in nodes.items()}
    if settings.threads > max(len(cores) for cores in usable.values()):
        raise _too_few(settings, usable, "allowed")
    claimed = {node: _claim(settings.shm_dir, cores) for node, cores in usable.items()}
    try:
        # A node without another server first: one server per node where there is a choice.
        node = max(
            usable,
            key=lambda n: (
                len(claimed[n]) >= settings.threads,
                len(claimed[n]) == len(usable[n]),
                len(claimed[n]),
            ),
        )
        pinned = sorted(claimed[node])[: settings.threads]
        if len(pinned) < settings.threads:
            free = {node: sorted(cores) for node, cores in claimed.items()}
            raise _too_few(settings, free, "not taken by other servers")
        return Cores(pinned, nodes, [claimed[node].pop(core) for core in pinned])
    finally:
        for locks in claimed.values():
            for descriptor in locks.values():
                os.close(descriptor)


def numa_nodes(folder: Path = NODES) -> dict[int, list[int]]:
    """Cores of each NUMA node that has any; a single node 0 where the kernel names none."""
    nodes = {
        int(node.name.removeprefix("node")): cores
        for node in folder.glob("node[0-9]*")
        if (cores := _core_list((node / "cpulist").read_text()))
    }
    return dict(sorted(nodes.items())) or {0: sorted(os.sched_getaffinity(0))}


def _core_list(text: str) -> list[int]:
    """Of the kernel's form, like `0-3,8-11`."""
    cores: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.extend(range(int(first), int(last or first) + 1))
    return cores


def _claim(folder: Path, cores: list[int]) -> dict[int, int]:
    """Locks those of `cores` that nobody has; descriptors by core."""
    locks: dict[int, int] = {}
    for core in cores:
        path = folder / f"omniserve-core-{core}.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SharedMemoryError(f"cannot open {path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
        else:
            locks[core] = descriptor
    return locks


def _too_few(settings: CpuAttnSettings, cores: dict[int, list[int]], which: str) -> SettingsError:
    counts = ", ".join(f"{len(found)} on NUMA node {node}" for node, found in cores.items())
    return SettingsError(
        f"threads: {settings.threads} exclusive cores of one node asked for; {which}: {counts}",
        field="threads",
    )
