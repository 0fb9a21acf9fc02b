"""Prints what one of our distributions needs from others, a requirement a line.

The Dockerfile installs these before our own wheels, so that a change of our code rebuilds only the
last layer. Usage: `third_party.py client bench`, which is `omniserve-client[bench]`.
"""

import re
import sys
import tomllib
from pathlib import Path


def third_party(name: str, extras: list[str]) -> set[str]:
    """Requirements of the distribution in folder `name`, through those of ours that it needs."""
    project = tomllib.loads((Path(name) / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    found: set[str] = set()
    for requirement in wanted:
        ours = re.fullmatch(r"omniserve-(\w+)", requirement)
        found |= third_party(ours[1], []) if ours else {requirement}
    return found


if __name__ == "__main__":
    print("\n".join(sorted(third_party(sys.argv[1], sys.argv[2:]))))
