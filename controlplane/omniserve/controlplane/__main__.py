"""`python -m omniserve.controlplane`: see settings.py for flags."""

from __future__ import annotations

import asyncio
import logging
import sys

from omniserve.controlplane import server, settings
from omniserve.rpc import exit_on_error


def main() -> None:
    with exit_on_error("controlplane"):
        config = settings.load(sys.argv[1:])
        logging.basicConfig(
            stream=sys.stderr,
            format="%(asctime)s %(levelname)s controlplane %(name)s %(message)s",
        )
        logging.getLogger("omniserve").setLevel(config.log_level.upper())
        asyncio.run(server.serve(config))


if __name__ == "__main__":
    main()
