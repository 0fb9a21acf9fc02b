"""`make compose-test`: builds the images and puts a deployment of them through its drills.

Prints one JSON object last, on stdout; progress goes to stderr. Exits 1 if something that must be
true was not. `--smoke` leaves out load and faults.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from deployment import REPOSITORY, SERVICES, Deployment, docker, say
from jobs import Jobs

from omniserve.client import (
    Client,
    OmniServeError,
    SamplingParams,
    Slo,
    UnauthenticatedError,
    UnreachableError,
)
from omniserve.client.bench.chat_load import ChatLoad
from omniserve.client.bench.metrics import attainment
from omniserve.client.bench.settings import BenchSettings
from omniserve.client.bench.texts import dialogues, problems

LOAD_S = 30.0
BACKLOG_ITEMS = 48
QUEUED_JOBS = 8
RECOVERY_MAX_S = 20.0
# An answer of the load takes no longer than this within its objectives.
ANSWER_S = 5.0
IMAGE_MB_MAX = {"controlplane": 250, "client": 250, "cpuattn": 200}
IMAGES = ("controlplane", "gpuworker", "cpuattn", "client", "init")
SMALL_MEMORY = {"SHM_BYTES": str(64 << 20), "ATTENTION_MEMORY": "128m"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="leave out load and faults")
    parser.add_argument("--compose", default="docker compose", help="or docker-compose")
    options = parser.parse_args()
    stack = Deployment("omniserve-test", options.compose.split())
    report: dict[str, Any] = {}
    wrong: list[str] = []
    try:
        say("building the images")
        stack.compose("--profile", "client", "build")
        report["image_mb"] = image_mb(wrong)
        say("starting")
        stack.up()
        check_door(stack, wrong)
        check_client_container(stack)
        if not options.smoke:
            drill(stack, report, wrong)
    finally:
        say("removing everything")
        wrong += [f"left behind: {name}" for name in stack.tear_down()]
    check_small_memory(options.compose.split(), wrong)
    for line in wrong:
        say(f"FAILED: {line}")
    print(json.dumps(report))
    sys.exit(bool(wrong))


def image_mb(wrong: list[str]) -> dict[str, int]:
    """Sizes of the images without their common base."""
    base_bytes = _image_bytes(docker("build", "-q", "--target", "base", str(REPOSITORY)))
    sizes = {name: _image_bytes(f"omniserve-{name}:local") - base_bytes for name in IMAGES}
    found = {name: round(size / 1e6) for name, size in sizes.items()}
    wrong += [
        f"image {name}: {found[name]} MB, at most {most}"
        for name, most in IMAGE_MB_MAX.items()
        if found[name] > most
    ]
    return found


def check_door(stack: Deployment, wrong: list[str]) -> None:
    """The published port lets in who has the key, through TLS, and nobody else."""
    with stack.client() as client:
        client.models()
    with stack.client("not-the-key") as client:
        _expect(UnauthenticatedError, client, "a wrong key", wrong)
    with stack.client("") as client:
        _expect(UnauthenticatedError, client, "no key", wrong)
    with stack.client(tls=False) as client:
        _expect(UnreachableError, client, "plain text", wrong)


def check_client_container(stack: Deployment) -> None:
    say("asking from the client container")
    stack.compose("run", "--rm", "-T", "client", "generate", "--max-tokens", "8", "Name a river.")


def drill(stack: Deployment, report: dict[str, Any], wrong: list[str]) -> None:
    """Load, then load with every service killed once, then a restart of everything."""
    settings = BenchSettings(duration_s=3600.0, request_rate=0.5, show_answers=0)
    jobs = Jobs(problems(), BACKLOG_ITEMS)
    faults: list[tuple[float, float]] = []
    recovery_s: dict[str, float] = {}
    with stack.client() as client:
        load = ChatLoad(client, settings, dialogues())
        jobs.start(client)
        load.warm_up()
        load.start()
        say(f"{LOAD_S:.0f} s of mixed load")
        time.sleep(LOAD_S)
        for service in SERVICES:
            say(f"killing {service}")
            killed_s = time.perf_counter()
            stack.kill(service)
            _wait_for_an_answer(client, settings)
            answered_s = time.perf_counter()
            faults.append((killed_s - ANSWER_S, answered_s))
            recovery_s[service] = round(answered_s - killed_s, 2)
            stack.wait_until_healthy()
            time.sleep(ANSWER_S)
        end_s = time.perf_counter()
        jobs.stop()
        load.finish(ANSWER_S)
        judged = [
            record
            for record in list(load.records)
            if record.due_s < end_s - ANSWER_S
            and not any(start <= record.due_s <= end for start, end in faults)
        ]
        report["ls_attainment_outside_faults"] = attainment(
            judged, settings.slo_ttft_ms, settings.slo_tpot_ms
        )
        say(f"{len(judged)} LS requests outside of faults; restarting everything with a full queue")
        for _ in range(QUEUED_JOBS):
            jobs.submit(client)
        queued = jobs.unfinished(client)
    stack.down()
    stack.up()
    if not queued:
        wrong.append("nothing was queued when everything was stopped")
    with stack.client() as client:
        completed, duplicates = jobs.collect(client)
    report |= {
        "be_submitted": jobs.submitted,
        "be_completed": completed,
        "be_duplicates": duplicates,
        "recovery_s": recovery_s,
    }
    if completed != jobs.submitted or duplicates:
        wrong.append(f"jobs: {completed} of {jobs.submitted} completed, {duplicates} twice")
    wrong += [
        f"{service}: LS answered after {s} s"
        for service, s in recovery_s.items()
        if s > RECOVERY_MAX_S
    ]


def check_small_memory(compose: list[str], wrong: list[str]) -> None:
    """Without room for its arena, in the tmpfs or in its container, a server ends and says why."""
    for name, value in SMALL_MEMORY.items():
        stack = Deployment("omniserve-test-small", compose, **{name: value})
        try:
            ended = stack.compose("run", "--rm", "-T", "--no-deps", "cpuattn-a0", check=False)
            said = [line for line in ended.stdout.splitlines() if "too small" in line]
            say(f"{name}={value}: status {ended.returncode}, {said[-1] if said else ended.stdout}")
            if ended.returncode == 0 or not said:
                wrong.append(f"{name}={value} did not end in a clear error")
        finally:
            wrong += [f"left behind: {name}" for name in stack.tear_down()]


def _wait_for_an_answer(client: Client, settings: BenchSettings) -> None:
    """Sends LS requests until one is answered, by the load's own client: it reconnects as that."""
    while True:
        try:
            client.generate(
                "Name a river.",
                sampling=SamplingParams(max_tokens=4),
                slo=Slo(settings.slo_ttft_ms, settings.slo_tpot_ms),
                timeout_s=60.0,
            ).text()
        except OmniServeError:
            time.sleep(0.1)
        else:
            return


def _expect(error_type: type[OmniServeError], client: Client, what: str, wrong: list[str]) -> None:
    try:
        client.models()
    except error_type:
        return
    except OmniServeError as error:
        wrong.append(f"{what} ended in {error.reason}: {error.message}")
    else:
        wrong.append(f"{what} was let in")


def _image_bytes(name: str) -> int:
    return int(docker("image", "inspect", "-f", "{{.Size}}", name))


if __name__ == "__main__":
    main()
