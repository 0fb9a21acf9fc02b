"""Keeps measured latency profiles on disk, so that only the first start measures.

A file per kind of machine, model and kernel. One that is broken, or of another kind under the
same name, is as good as none: it is measured again and overwritten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from omniserve.latency import LatencyProfile

_log = logging.getLogger(__name__)
# Counts up when the profiler measures something else, or stages become faster or slower.
_VERSION = 3


@dataclasses.dataclass(frozen=True)
class ProfileKey:
    """All that measured times depend on."""

    hardware: str
    """The CPU's, or GPU's, name."""
    model_shape: tuple[int, ...]
    dtype: str
    threads: int
    kernel: str
    """Instruction set of the native kernels, and which build of them."""
    version: int = _VERSION

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(repr(self).encode()).hexdigest()
        return f"latency-{digest[:20]}.json"


def cached(
    folder: Path,
    key: ProfileKey,
    measure: Callable[[], LatencyProfile],
    is_bad: Callable[[LatencyProfile], bool],
) -> LatencyProfile:
    """Returns the profile of `key` from `folder`; measures and stores it if there is no good one.

    A folder that cannot be written costs the next start its measuring, and nothing else.
    """
    path = folder / key.file_name
    profile = _read(path, key)
    if profile is None or is_bad(profile):
        profile = measure()
        try:
            _write(path, key, profile)
        except OSError as error:
            _log.warning("latency profile not stored: %s", error)
    return profile


def _read(path: Path, key: ProfileKey) -> LatencyProfile | None:
    try:
        stored = json.loads(path.read_text())
        if stored["key"] != _plain(key):
            return None
        return LatencyProfile.from_json(json.dumps(stored["profile"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("latency profile %s ignored: %s", path, error)
        return None


def _write(path: Path, key: ProfileKey, profile: LatencyProfile) -> None:
    """A reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"key": _plain(key), "profile": json.loads(profile.to_json())}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".latency-")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(stored, file)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def _plain(key: ProfileKey) -> object:
    """As JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(key)))
