"""Settings of the worker: flags, their environment twins, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from omniserve.errors import SettingsError
from omniserve.gpuworker.settings import WorkerSettings


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WorkerSettings.model_fields:
        monkeypatch.delenv(f"OMNISERVE_WORKER_{name.upper()}", raising=False)


def test_every_setting_has_a_default_and_a_description() -> None:
    WorkerSettings.load([])
    for name, field in WorkerSettings.model_fields.items():
        assert not field.is_required(), name
        assert field.description, name


def test_flags_are_read_with_an_equals_sign_or_a_space() -> None:
    settings = WorkerSettings.load(
        ["--page-tokens=64", "--dtype", "float32", "--model-path=/m.gguf"]
    )
    assert (settings.page_tokens, settings.dtype) == (64, "float32")
    assert settings.model_path == Path("/m.gguf")


def test_the_environment_has_a_twin_of_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNISERVE_WORKER_WORKER_ID", "w7")
    monkeypatch.setenv("OMNISERVE_WORKER_DEVICE_KV_TOKENS", "4096")
    settings = WorkerSettings.load([])
    assert (settings.worker_id, settings.device_kv_tokens) == ("w7", 4096)


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNISERVE_WORKER_THREADS", "3")
    assert WorkerSettings.load(["--threads=1"]).threads == 1
    assert WorkerSettings.load([]).threads == 3


@pytest.mark.parametrize("flag", ["--thread=3", "--page_tokens=64", "--colour=red"])
def test_an_unknown_flag_is_refused_by_name(flag: str) -> None:
    with pytest.raises(SettingsError, match=flag.split("=")[0]):
        WorkerSettings.load([flag])


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--threads=0", "threads"),
        ("--threads=two", "threads"),
        ("--dtype=float64", "dtype"),
        ("--device=tpu", "device"),
        ("--device-kv-tokens=1", "device_kv_tokens"),
        ("--fault-moves-per-pass=1.5", "fault_moves_per_pass"),
        ("--orphan-lease-s=-1", "orphan_lease_s"),
        ("--be-placement=cloud", "be_placement"),
    ],
)
def test_a_bad_value_is_refused_by_name(flag: str, name: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: ") as caught:
        WorkerSettings.load([flag])
    assert caught.value.field == name


def test_a_bad_value_in_the_environment_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMNISERVE_WORKER_PREFILL_CHUNK_TOKENS_MAX", "many")
    with pytest.raises(SettingsError, match=r"^prefill_chunk_tokens_max: "):
        WorkerSettings.load([])


def test_addresses_of_attention_servers_are_split_at_commas() -> None:
    assert WorkerSettings.load([]).attention_server_addresses == []
    settings = WorkerSettings.load(["--attention-servers=127.0.0.1:1,127.0.0.1:2,"])
    assert settings.attention_server_addresses == ["127.0.0.1:1", "127.0.0.1:2"]


def test_settings_never_change() -> None:
    settings = WorkerSettings.load([])
    with pytest.raises(ValidationError, match="frozen"):
        settings.threads = 8
