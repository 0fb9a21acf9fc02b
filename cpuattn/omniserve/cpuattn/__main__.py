"""`python -m omniserve.cpuattn`."""

from __future__ import annotations

import sys

from omniserve import logs
from omniserve.cpuattn.server import serve
from omniserve.cpuattn.settings import CpuAttnSettings
from omniserve.rpc import exit_on_error


def main() -> None:
    with exit_on_error("cpuattn"):
        settings = CpuAttnSettings.load(sys.argv[1:])
        logs.configure("cpuattn", settings.log_level, settings.log_format)
        serve(settings)


if __name__ == "__main__":
    main()
