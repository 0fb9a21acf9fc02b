"""The supervisor of a local stack: it starts everything, mends it, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.random_models import Kind
from support.random_models import make as make_random
from support.stack import MODEL_PATH
from transformers import AutoTokenizer

from omniserve.client import Client, SamplingParams
from omniserve.client.stack import ProcessFailedError, Stack, StackSettings
from omniserve.errors import AddressInUseError, ModelFileError, SharedMemoryError

WAIT_S = 180.0
Make = Callable[..., StackSettings]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Builds settings of a small stack with folders of its own."""
    with tempfile.TemporaryDirectory(prefix="test-stack-", dir="/dev/shm") as shm_dir:
        values: dict[str, object] = {
            "port": 0,
            "run_dir": str(tmp_path / "run"),
            "shm_dir": shm_dir,
            "arena_bytes": 200 << 20,
            "device_kv_tokens": 8192,
            "start_timeout_s": WAIT_S,
        }
        yield lambda **changes: StackSettings.model_validate({**values, **changes})


def wait_for(what: str, probe: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not probe():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for: {what}"
        time.sleep(0.1)


def survivors(groups: Iterable[int]) -> list[str]:
    """Returns /proc/*/stat of the live processes in these groups; zombies are not alive."""
    wanted, found = set(groups), []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stat = path.read_text()
            state, _parent, group = stat.rsplit(")", 1)[1].split()[:3]
            if int(group) in wanted and state != "Z":
                found.append(stat)
    return found


def answer(stack: Stack) -> str:
    with Client(stack.address) as client:
        return client.generate("Hello", sampling=SamplingParams(max_tokens=4)).text()


def test_a_stack_answers_and_stops_without_leaving_anything(make: Make) -> None:
    wanted = make()
    with Stack(wanted) as stack:
        running = stack.processes()
        assert [p.name for p in running] == [
            "valkey",
            "cpuattn-a0",
            "cpuattn-a1",
            "gpuworker-w0",
            "controlplane",
        ]
        assert answer(stack)
    assert survivors(p.pid for p in running) == []
    assert list(Path(wanted.shm_dir).iterdir()) == []


def test_a_stack_serves_a_folder_with_every_sampling_option(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_random(Kind("small", "llama", {"vocab_size": 49_152})).save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(str(MODEL_PATH.parent), gguf_file=MODEL_PATH.name)
    words.save_pretrained(folder)
    command = [sys.executable, "-m", "omniserve.client", "generate", "--json", "--max-tokens=40"]
    options = ["--temperature=1.5", "--seed=3", "--top-k=500", "--top-p=0.95", "--min-p=0.001"]
    options += ["--repetition-penalty=1.1", "--presence-penalty=0.1", "--frequency-penalty=0.2"]

    def ask(address: str, *more: str) -> dict[str, Any]:
        arguments = [*command, f"--address={address}", *options, *more, "A river?"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=WAIT_S)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    with Stack(make(model_path=str(folder))) as stack:
        whole = ask(stack.address, "--logprobs=2")
        assert len(whole["logprobs"]) == whole["usage"]["completion_tokens"] == 40
        assert all(len(entry["top"]) == 2 for entry in whole["logprobs"])
        text = whole["text"]
        stop = text[len(text) // 2 :][:3]
        stopped = ask(stack.address, "--stop=never there", f"--stop={stop}")
        assert (stopped["text"], stopped["finish_reason"]) == (text[: text.find(stop)], "stop")
        best_effort = ask(stack.address, "--service-class=best_effort")
        assert best_effort["text"] == text


def test_a_dead_attention_server_and_control_plane_are_started_again(make: Make) -> None:
    with Stack(make()) as stack:
        for name in ("cpuattn-a1", "controlplane"):
            before = {p.name: p.pid for p in stack.processes()}
            os.kill(before[name], signal.SIGKILL)
            wait_for(
                f"{name} to run again",
                lambda name=name, before=before: (  # type: ignore[misc]
                    {p.name: p.pid for p in stack.processes()}[name] != before[name]
                ),
            )

        def reachable() -> bool:
            with socket.socket() as probe:
                host, port = stack.address.split(":")
                return probe.connect_ex((host, int(port))) == 0

        wait_for("the control plane to listen again", reachable)
        assert answer(stack)


def test_a_dead_worker_ends_the_stack_and_says_so(make: Make) -> None:
    with Stack(make()) as stack:
        worker = next(p for p in stack.processes() if p.name == "gpuworker-w0")
        os.kill(worker.pid, signal.SIGKILL)
        assert stack.wait(WAIT_S)
        assert isinstance(stack.failure, ProcessFailedError)
        assert "gpuworker-w0 died" in stack.failure.message
        assert survivors(p.pid for p in stack.processes()) == []


def test_a_port_in_use_is_refused_before_anything_starts(make: Make) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        stack = Stack(make(port=taken.getsockname()[1]))
        with pytest.raises(AddressInUseError):
            stack.start()
    assert stack.processes() == []


def test_too_little_shared_memory_says_what_is_needed_and_available(make: Make) -> None:
    stack = Stack(make(arena_bytes=1 << 50))
    with pytest.raises(SharedMemoryError) as error:
        stack.start()
    assert int(error.value.metadata["needed_bytes"]) >= 2 << 50
    assert int(error.value.metadata["available_bytes"]) > 0


def test_an_unreadable_model_is_named_by_the_process_that_cannot_read_it(
    make: Make, tmp_path: Path
) -> None:
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(b"GGUF\x03\0\0\0")
    wanted = make(model_path=str(truncated))
    with pytest.raises(ModelFileError):
        Stack(wanted).start()
    assert list(Path(wanted.shm_dir).iterdir()) == []


UP = "from omniserve.client.cli import main; main()"


def start_up(wanted: StackSettings) -> tuple[subprocess.Popen[str], list[int]]:
    """Starts `omniserve up`; returns it and the pids that it prints, once it is ready."""
    flags = [
        part
        for name in ("port", "run_dir", "shm_dir", "arena_bytes", "device_kv_tokens")
        for part in (f"--{name.replace('_', '-')}", str(getattr(wanted, name)))
    ]
    up = subprocess.Popen(
        [sys.executable, "-c", UP, "up", *flags], stderr=subprocess.PIPE, text=True
    )
    assert up.stderr is not None
    pids = []
    for line in up.stderr:
        words = line.split()
        if "pid" in words:
            pids.append(int(words[words.index("pid") + 1]))
        if line.startswith("ready on"):
            return up, pids
    raise AssertionError(f"omniserve up ended with {up.wait()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_of_up_cleanly(make: Make, number: signal.Signals) -> None:
    wanted = make()
    up, pids = start_up(wanted)
    time.sleep(1.0)  # it has said that it is ready; by now it waits for its end
    up.send_signal(number)
    assert up.wait(WAIT_S) == 0
    assert survivors(pids) == []
    assert list(Path(wanted.shm_dir).iterdir()) == []


def test_no_process_outlives_a_killed_supervisor(make: Make) -> None:
    wanted = make()
    up, pids = start_up(wanted)
    up.kill()
    up.wait()
    wait_for("all processes to die", lambda: not survivors(pids))
    with pytest.raises(SharedMemoryError):  # starting again clears what the dead one shared
        Stack(make(arena_bytes=1 << 50)).start()
    assert list(Path(wanted.shm_dir).iterdir()) == []
