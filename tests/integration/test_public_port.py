"""The control plane's port with TLS and API keys, and who gets in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.certificates import Certificate, self_signed
from support.stack import MODEL_PATH, ControlPlane, Stack

from omniserve.client import (
    Client,
    JobItem,
    SamplingParams,
    UnauthenticatedError,
    UnreachableError,
)
from omniserve.errors import SettingsError, from_rpc_error

KEY, SECOND_KEY = "sk-first", "sk-second"
MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("public-port")


@pytest.fixture(scope="module")
def certificate(folder: Path) -> Certificate:
    return self_signed(folder)


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Certificate:
    return self_signed(folder, "stranger")


@pytest.fixture(scope="module")
def key_file(folder: Path) -> Path:
    path = folder / "keys"
    path.write_text(f"# of the tests\n\n{KEY}\n  {SECOND_KEY}  \n")
    return path


@pytest.fixture(scope="module")
def controlplane(folder: Path, certificate: Certificate, key_file: Path) -> Iterator[ControlPlane]:
    with Stack(folder) as stack:
        stack.worker()
        yield stack.controlplane(
            tls_cert_file=certificate.cert, tls_key_file=certificate.key, api_key_file=key_file
        )


@pytest.mark.parametrize("key", [KEY, SECOND_KEY])
def test_a_client_with_certificate_and_key_is_served(
    controlplane: ControlPlane, certificate: Certificate, key: str
) -> None:
    with Client(controlplane.address, tls_ca_file=certificate.cert, api_key=key) as client:
        assert client.generate("hi", sampling=SamplingParams(max_tokens=4)).text()
        job_id = client.submit_job([JobItem("first", "hi")])
        assert len(list(client.job_results(job_id))) == 1
        assert client.status().workers


@pytest.mark.parametrize("key", ["", KEY[:-1], f"{KEY}x", f"{KEY} {SECOND_KEY}", "# of the tests"])
def test_a_wrong_key_is_refused_in_every_kind_of_call(
    controlplane: ControlPlane, certificate: Certificate, key: str
) -> None:
    with Client(controlplane.address, tls_ca_file=certificate.cert, api_key=key) as client:
        for call in (
            client.models,
            lambda: client.generate("hi", model=MODEL).text(),
            lambda: list(client.job_results("any")),
        ):
            with pytest.raises(UnauthenticatedError) as refused:
                call()
            assert KEY not in str(refused.value)


def test_a_refusal_says_nothing_of_what_was_asked_for(controlplane: ControlPlane) -> None:
    method = controlplane.channel.unary_unary("/omniserve.v1.NoService/NoMethod")
    with pytest.raises(grpc.RpcError) as refused:
        method(b"")
    assert isinstance(from_rpc_error(refused.value), UnauthenticatedError)


def test_health_needs_no_key_and_reflection_does(controlplane: ControlPlane) -> None:
    assert controlplane.health() == 1
    stub = reflection_pb2_grpc.ServerReflectionStub(controlplane.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.ServerReflectionInfo(iter([asked])))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    metadata = [("authorization", f"Bearer {KEY}")]
    (answer,) = stub.ServerReflectionInfo(iter([asked]), metadata=metadata)
    names = {service.name for service in answer.list_services_response.service}
    assert "omniserve.v1.InferenceService" in names


def test_plain_text_to_a_tls_port_is_unreachable_and_says_why(controlplane: ControlPlane) -> None:
    with Client(controlplane.address) as client, pytest.raises(UnreachableError) as refused:
        client.models()
    assert "expect TLS" in refused.value.message


def not_trusted() -> pytest.RaisesExc[UnreachableError]:
    return pytest.raises(UnreachableError, match="not trusted")


def test_a_certificate_of_somebody_else_is_not_trusted(
    controlplane: ControlPlane, stranger: Certificate
) -> None:
    with (
        Client(controlplane.address, tls_ca_file=stranger.cert, api_key=KEY) as client,
        not_trusted(),
    ):
        client.models()
    with Client(controlplane.address, tls=True, api_key=KEY) as client, not_trusted():
        client.models()


def test_the_client_sends_no_key_in_plain_text_to_another_machine() -> None:
    with pytest.raises(SettingsError, match="plain text"):
        Client("192.0.2.1:8500", api_key=KEY)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMNISERVE_")}
    return subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        env={**environment, **variables},
        check=False,
        timeout=120,
    )


def test_the_command_is_let_in_by_flags_and_by_variables(
    controlplane: ControlPlane, certificate: Certificate, key_file: Path
) -> None:
    generate = ("omniserve.client", "generate", "hi", "--max-tokens=4", "--json")
    flags = [f"--address={controlplane.address}", f"--tls-ca-file={certificate.cert}"]
    by_flags = run(*generate, *flags, f"--api-key-file={key_file}")
    assert json.loads(by_flags.stdout)["finish_reason"] == "length", by_flags.stderr
    variables = {
        "OMNISERVE_ADDRESS": controlplane.address,
        "OMNISERVE_TLS_CA_FILE": str(certificate.cert),
    }
    by_file = run(*generate, **variables, OMNISERVE_API_KEY_FILE=str(key_file))
    by_key = run(*generate, **variables, OMNISERVE_API_KEY=SECOND_KEY, OMNISERVE_TLS="")
    assert by_file.returncode == by_key.returncode == 0
    without = run(*generate, **variables)
    assert without.returncode == 1
    assert without.stderr.startswith("omniserve: UNAUTHENTICATED: ")


def test_a_key_is_no_flag() -> None:
    done = run("omniserve.client", "generate", "hi", f"--api-key={KEY}")
    assert done.returncode == 2


def test_the_load_generator_is_let_in(
    controlplane: ControlPlane, certificate: Certificate, key_file: Path, folder: Path
) -> None:
    flags = {
        "address": controlplane.address,
        "tls-ca-file": certificate.cert,
        "api-key-file": key_file,
        "duration-s": 2,
        "request-rate": 4,
        "be-backlog": 4,
        "be-max-tokens": 8,
        "ls-max-tokens": 4,
        "output-dir": folder / "bench",
    }
    arguments = (f"--{name}={value}" for name, value in flags.items())
    done = run("omniserve.client", "bench", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert "UNAUTHENTICATED" not in done.stdout
    assert report


def test_the_health_check_trusts_the_server_s_own_certificate(
    controlplane: ControlPlane, certificate: Certificate, stranger: Certificate
) -> None:
    check = ("omniserve.healthcheck", controlplane.address)
    assert run(*check, f"--tls-ca-file={certificate.cert}").returncode == 0
    assert run(*check, f"--tls-ca-file={stranger.cert}").returncode == 1
    assert run(*check).returncode == 1


def test_the_health_check_may_be_told_the_name_in_the_certificate(
    folder: Path, stranger: Certificate
) -> None:
    with Stack(folder) as stack:
        stack.worker()
        address = stack.controlplane(
            tls_cert_file=stranger.cert, tls_key_file=stranger.key
        ).address.replace("127.0.0.1", "localhost")
        check = ("omniserve.healthcheck", address, f"--tls-ca-file={stranger.cert}")
        assert run(*check).returncode == 1
        assert run(*check, "--tls-server-name=stranger").returncode == 0


def refusal(*flags: str, listen: str = "127.0.0.1:0") -> str:
    defaults = (f"--listen={listen}", f"--model-path={MODEL_PATH}")
    done = run("omniserve.controlplane", *defaults, *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("controlplane: SETTINGS: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_what_protects_the_port_is_checked_at_start(
    folder: Path, certificate: Certificate, stranger: Certificate, key_file: Path
) -> None:
    empty = folder / "empty"
    empty.write_text("# none\n")
    cert, key = f"--tls-cert-file={certificate.cert}", f"--tls-key-file={certificate.key}"
    assert "tls_key_file: " in refusal(cert)
    assert "tls_cert_file: " in refusal(key)
    assert str(stranger.key) in refusal(cert, f"--tls-key-file={stranger.key}")
    assert str(key_file) in refusal(cert, f"--tls-key-file={key_file}")
    assert "/none" in refusal("--tls-cert-file=/none", key)
    assert f"{empty}: no key" in refusal(f"--api-key-file={empty}")
    assert "/none" in refusal("--api-key-file=/none")


def test_keys_in_plain_text_are_for_loopback_only(key_file: Path) -> None:
    flag = f"--api-key-file={key_file}"
    for listen in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "somewhere:0"):
        assert "plain text" in refusal(flag, listen=listen)
