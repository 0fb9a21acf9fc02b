"""The checked-in stubs are what protoc makes of the .proto files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).parents[2] / "proto"
KINDS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def stubs(root: Path) -> dict[str, str]:
    """Returns the text of every generated file by its path under `root`."""
    return {
        str(path.relative_to(root)): path.read_text()
        for kind in KINDS
        for path in (root / "omniserve").rglob(kind)
    }


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path) -> None:
    protos = sorted(str(p.relative_to(PROTO)) for p in PROTO.glob("omniserve/**/*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, *protos],
        cwd=PROTO,
        check=True,
    )
    fresh, kept = stubs(tmp_path), stubs(PROTO)
    assert sorted(fresh) == sorted(kept)
    stale = [path for path, text in fresh.items() if kept[path] != text]
    assert stale == [], "run `make proto`"
