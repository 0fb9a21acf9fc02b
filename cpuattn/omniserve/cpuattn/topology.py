"""Which cores the hot loop's threads run on."""

from __future__ import annotations

import os

from omniserve.cpuattn.settings import CpuAttnSettings
from omniserve.errors import SettingsError


def choose_cores(settings: CpuAttnSettings) -> list[int]:
    """Core of each thread; empty when threads are not pinned. Raises SettingsError."""
    if settings.cores == "shared":
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if settings.threads > len(allowed):
        raise SettingsError(
            f"threads: {settings.threads} exclusive cores asked for, {len(allowed)} allowed",
            field="threads",
        )
    return allowed[: settings.threads]
