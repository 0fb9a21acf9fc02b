"""`python -m omniserve.controlplane`: see settings.py for flags."""

from __future__ import annotations

import asyncio
import sys

from omniserve import logs
from omniserve.controlplane import server
from omniserve.controlplane.settings import Settings
from omniserve.rpc import exit_on_error


def main() -> None:
    with exit_on_error("controlplane"):
        settings = Settings.load(sys.argv[1:])
        logs.configure("controlplane", settings.log_level, settings.log_format)
        asyncio.run(server.serve(settings))


if __name__ == "__main__":
    main()
