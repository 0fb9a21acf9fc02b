"""Usage errors of the `omniserve` command exit 2 and name what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "omniserve.client", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("command", ["up", "generate", "bench", "demo"])
def test_help_lists_the_flags_and_their_variables(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "[env: OMNISERVE_" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bench", "--request-rate", "-1"], "request_rate"),
        (["up", "--dtype", "int3"], "dtype"),
        (["up", "--prot", "1"], "--prot"),
        (["generate", "hi", "--service-class", "urgent"], "service_class"),
    ],
)
def test_a_bad_flag_exits_2_and_is_named(arguments: list[str], named: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stdout == ""


def test_a_bad_variable_exits_2_and_is_named() -> None:
    done = run("up", OMNISERVE_PORT="many")
    assert done.returncode == 2
    assert "port" in done.stderr


def test_a_list_in_a_variable_that_is_no_json_exits_2_and_is_named() -> None:
    done = run("generate", "hi", OMNISERVE_STOP=".")
    assert done.returncode == 2
    assert "stop" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_deployment_that_is_not_there_exits_1_with_one_line() -> None:
    done = run("generate", "hi", "--address", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("omniserve: UNREACHABLE: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_flag_wins_over_its_variable() -> None:
    done = run("generate", "hi", "--address", "127.0.0.1:1", OMNISERVE_ADDRESS="127.0.0.1:2")
    assert "127.0.0.1:1" in done.stderr
