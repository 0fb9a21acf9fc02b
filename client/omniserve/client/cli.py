"""The `omniserve` command. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import signal
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import click
from pydantic import Field
from rich.console import Console

from omniserve.client import Client, Message, SamplingParams, ServiceClass
from omniserve.client._options import options_of, read
from omniserve.client.bench.settings import BenchSettings
from omniserve.client.connect_settings import ConnectSettings
from omniserve.client.stack import Stack, StackSettings
from omniserve.rpc import exit_on_error


class GenerateSettings(ConnectSettings):
    """Settings of `omniserve generate`."""

    model: str = Field(default="", description="Model name; empty is the first one served.")
    max_tokens: int = Field(default=128, ge=1, description="Tokens to generate.")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy.")
    seed: int = Field(default=0, ge=0, description="Of sampling.")
    top_k: int = Field(default=0, ge=0, description="Draw from so many tokens only; 0 is all.")
    top_p: float = Field(
        default=0.0, ge=0, le=1, description="Draw from tokens of this probability; 0 is all."
    )
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Least probability, as a part of the best token's."
    )
    repetition_penalty: float = Field(
        default=0.0, ge=0, description="Over 1: tokens of prompt and answer come less; 0 is off."
    )
    presence_penalty: float = Field(default=0.0, description="Over 0: the answer's come less.")
    frequency_penalty: float = Field(
        default=0.0, description="Over 0: they come the less the more often they came."
    )
    stop: tuple[str, ...] = Field(
        default=(),
        description="String to end before; may be given several times (variable: a JSON list).",
    )
    logprobs: int = Field(
        default=0, ge=0, description="With --json: log probabilities of so many tokens each."
    )
    service_class: ServiceClass = Field(
        default=ServiceClass.LATENCY_SENSITIVE, description="latency_sensitive or best_effort."
    )
    timeout_s: float = Field(default=300.0, gt=0, description="For the whole answer, s.")


class DemoStackSettings(StackSettings):
    """As for `up`, but beside whatever else runs here, and with a small device.

    The backlog does not fit 4096 tokens of device KV, as on a GPU that LS has nearly filled: what
    the demo shows is the part of the backlog that decodes through the attention servers.
    """

    port: int = Field(default=0, ge=0, le=65535, description="Public port; 0 picks a free one.")
    device_kv_tokens: int = Field(default=4096, ge=256, description="Tokens of KV on the device.")
    run_dir: str = Field(default="runs/demo", description="Folder for logs.")


class DemoBenchSettings(BenchSettings):
    """As for `bench`."""

    output_dir: str = Field(
        default="runs/demo", description="Folder for report.json and report.png."
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Serve one model to interactive and best-effort requests at once."""


@cli.command()
@options_of(StackSettings)
def up(**flags: Any) -> None:
    """Run the whole system on this machine until Ctrl-C."""
    stack = Stack(read(StackSettings, flags))
    console = Console(stderr=True)
    try:
        _start(stack, console)
        console.print(
            f"ready on {stack.address}; try: "
            f'omniserve generate --address {stack.address} "Why is the sky blue?"',
            soft_wrap=True,
        )
        stack.wait()
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        stack.stop()
    if stack.failure is not None:
        raise stack.failure


@cli.command()
@click.argument("prompt")
@click.option("--raw", is_flag=True, help="Continue the prompt instead of answering it as a chat.")
@options_of(GenerateSettings)
@json_option
def generate(prompt: str, raw: bool, as_json: bool, **flags: Any) -> None:
    """Stream the answer to PROMPT."""
    s = read(GenerateSettings, flags)
    with s.client() as client:
        running = client.generate(
            prompt if raw else None,
            messages=None if raw else [Message("user", prompt)],
            model=s.model,
            service_class=s.service_class,
            sampling=SamplingParams(
                **{f.name: getattr(s, f.name) for f in fields(SamplingParams) if hasattr(s, f.name)}
            ),
            timeout_s=s.timeout_s,
        )
        with running:
            chunks = []
            for chunk in running:
                chunks.append(chunk)
                if not as_json:
                    click.echo(chunk.text, nl=False)
    if not as_json:
        click.echo()
        return
    reason, usage = running.finish_reason, running.usage
    answer: dict[str, Any] = {
        "request_id": running.request_id,
        "text": "".join(chunk.text for chunk in chunks),
        "finish_reason": reason.value if reason else None,
        "usage": vars(usage) if usage else None,
    }
    if s.logprobs:
        answer["logprobs"] = [asdict(one) for chunk in chunks for one in chunk.logprobs]
    click.echo(json.dumps(answer))


@cli.command()
@options_of(ConnectSettings, BenchSettings)
@json_option
def bench(as_json: bool, **flags: Any) -> None:
    """Load a running stack with chat beside a best-effort backlog, and report."""
    from omniserve.client.bench import run_bench

    settings = read(BenchSettings, flags)
    connection = read(ConnectSettings, flags)
    report = run_bench(connection.client, settings, Console(stderr=as_json))
    if as_json:
        click.echo(json.dumps(report))


@cli.command()
@options_of(DemoStackSettings, DemoBenchSettings)
@json_option
def demo(as_json: bool, **flags: Any) -> None:
    """Start the system, run the benchmark, stop the system."""
    from omniserve.client.bench import run_bench

    stack = Stack(read(DemoStackSettings, flags))
    settings = read(DemoBenchSettings, flags)
    console = Console(stderr=as_json)

    def alive() -> None:
        if stack.failure is not None:
            raise stack.failure

    try:
        _start(stack, console)
        report = run_bench(partial(Client, stack.address), settings, console, alive)
    finally:
        stack.stop()
    alive()
    console.print("stopped every process")
    if as_json:
        click.echo(json.dumps(report))


def _start(stack: Stack, console: Console) -> None:
    logs = Path(stack.settings.run_dir)
    console.print(f"starting: the worker loads the model and measures its stages; logs in {logs}")
    stack.start()
    for process in stack.processes():
        console.print(f"  {process.name:14} pid {process.pid:<8} {process.address}")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: exit 2 on usage errors, 1 on failures and when interrupted."""
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _interrupt)
    with exit_on_error("omniserve"):
        cli(prog_name="omniserve")


if __name__ == "__main__":
    main()
