"""Runs `cpuattn/csrc/tests`, programs under a sanitizer that end with 0 or a report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "cpuattn"
# The environment's own, which nobody need have put on the path.
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "cmake"

Build = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a program under a sanitizer; what two programs share is compiled once."""
    folder = tmp_path_factory.mktemp("native")

    def compiled(program: str, sanitizer: str) -> Path:
        where = folder / sanitizer.replace(",", "-")
        options = {"PYTHON": "OFF", "NATIVE_TESTS": "ON", "SANITIZE": sanitizer}
        flags = [f"-DOMNISERVE_{name}={value}" for name, value in options.items()]
        _run(CMAKE, "-S", str(SOURCE), "-B", str(where), *flags)
        _run(CMAKE, "--build", str(where), "--parallel", "2", "--target", program)
        return where / "csrc" / "tests" / program

    return compiled


def _run(*command: str) -> str:
    # A report of the sanitizer ends the program, also one of undefined behaviour.
    environment = {**os.environ, "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    # Damaged segments name damaged paths.
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-8000:]
    return ended.stdout


def test_rings_order_all_that_two_threads_do_with_slots_spinning_and_asleep(build: Build) -> None:
    _run(str(build("ring_threads", "thread")))


def test_ring_indices_match_a_model_where_they_wrap(build: Build) -> None:
    _run(str(build("ring_model", "address,undefined")))


def test_steps_see_all_that_the_steps_before_them_wrote_whoever_comes_late(build: Build) -> None:
    _run(str(build("steps_threads", "thread")))


@pytest.mark.slow
def test_a_million_hostile_messages_touch_nothing_and_change_no_honest_answer(
    build: Build, tmp_path: Path
) -> None:
    program = build("hostile_worker", "address,undefined")
    print(_run(str(program), str(tmp_path), "1000000"))
