"""`python -m omniserve.cpuattn`."""

from __future__ import annotations

import sys

from omniserve.cpuattn.server import serve
from omniserve.cpuattn.settings import load_settings
from omniserve.rpc import exit_on_error


def main() -> None:
    with exit_on_error("cpuattn"):
        serve(load_settings(sys.argv[1:]))


if __name__ == "__main__":
    main()
