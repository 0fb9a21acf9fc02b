"""One deployment of docker-compose.yml under a project name, ports and secrets of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from omniserve.client import Client

REPOSITORY = Path(__file__).parents[2]
SERVICES = ("redis", "cpuattn-a0", "cpuattn-a1", "gpuworker", "controlplane")
HEALTHY_WITHIN_S = 180.0
BUILD_WITHIN_S = 1800.0
COMPOSE_WITHIN_S = 300.0


_STARTED_S = time.monotonic()


def say(text: str) -> None:
    elapsed_s = time.monotonic() - _STARTED_S
    print(f"compose-test {elapsed_s:4.0f} s: {text}", file=sys.stderr, flush=True)


def docker(*arguments: str) -> str:
    """Runs the Docker CLI; returns what it printed. Raises CalledProcessError."""
    command = ["docker", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class Deployment:
    """Made from the repository's files; `tear_down` leaves nothing of it but images."""

    def __init__(self, project: str, compose: list[str], **settings: str) -> None:
        """`settings` win over .env; `compose` is the command of Compose v2 or of its forerunner."""
        self.project = project
        self._compose = compose
        self._secrets = Path(tempfile.mkdtemp(prefix=f"{project}-"))
        self._secrets.chmod(0o755)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._environment = {
            **os.environ,
            "DOCKER_BUILDKIT": "1",
            "COMPOSE_DOCKER_CLI_BUILD": "1",
            "COMPOSE_PROJECT_NAME": project,
            "SECRETS_DIR": str(self._secrets),
            "PORT": str(self.port),
            **settings,
        }

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a compose command; what it says goes to our caller only if it fails."""
        done = subprocess.run(
            [*self._compose, *arguments],
            cwd=REPOSITORY,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_WITHIN_S if "build" in arguments else COMPOSE_WITHIN_S,
        )
        if check and done.returncode:
            say(done.stdout)
            done.check_returncode()
        return done

    def up(self) -> None:
        """Starts everything and waits until all of it is healthy."""
        self.compose("up", "-d", "--no-build")
        self.wait_until_healthy()

    def down(self) -> None:
        """Stops everything in order; volumes stay."""
        self.compose("down")

    def client(self, api_key: str | None = None, *, tls: bool = True) -> Client:
        """A client outside of the containers; with the key that `init` made unless given one."""
        if api_key is None:
            api_key = (self._secrets / "client" / "api-key").read_text().strip()
        ca_file = self._secrets / "client" / "ca.crt" if tls else None
        return Client(
            f"127.0.0.1:{self.port}", tls_ca_file=ca_file, api_key=api_key, timeout_s=10.0
        )

    def kill(self, service: str) -> None:
        """Kills a container's main process behind the engine's back.

        `docker kill` would count as a stop by hand, after which nothing is restarted.
        """
        kill = ["kill", "-9", str(self._state(service)["Pid"])]
        subprocess.run(kill if os.geteuid() == 0 else ["sudo", *kill], check=True)

    def wait_until_healthy(self) -> None:
        """Raises TimeoutError naming who is not."""
        deadline_s = time.monotonic() + HEALTHY_WITHIN_S
        while sick := [s for s in SERVICES if not self._is_healthy(s)]:
            if time.monotonic() > deadline_s:
                say(self.compose("logs", "--tail", "50", check=False).stdout)
                raise TimeoutError(f"not healthy: {', '.join(sick)}")
            time.sleep(0.5)

    def tear_down(self) -> list[str]:
        """Removes all of it; returns what is left nevertheless."""
        self.compose("--profile", "client", "down", "--volumes", "--remove-orphans", check=False)
        shutil.rmtree(self._secrets)
        label = f"label=com.docker.compose.project={self.project}"
        return [
            f"{kind} {name}"
            for kind in ("container", "volume", "network")
            for name in docker(
                kind, "ls", "-q", *(["-a"] if kind == "container" else []), "--filter", label
            ).split()
        ]

    def _is_healthy(self, service: str) -> bool:
        state = self._state(service)
        return bool(state["Running"]) and state.get("Health", {}).get("Status") == "healthy"

    def _state(self, service: str) -> Any:
        labels = (f"com.docker.compose.{k}" for k in ("project", "service"))
        filters = [
            f"--filter=label={label}={value}"
            for label, value in zip(labels, (self.project, service), strict=True)
        ]
        container = docker("ps", "-aq", *filters)
        return json.loads(docker("inspect", "-f", "{{json .State}}", container))
