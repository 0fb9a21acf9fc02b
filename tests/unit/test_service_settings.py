"""Where the settings of the services come from, and which source wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from omniserve.controlplane.settings import Settings as ControlPlaneSettings
from omniserve.cpuattn.settings import CpuAttnSettings
from omniserve.errors import SettingsError
from omniserve.gpuworker.settings import WorkerSettings
from omniserve.settings import ServiceSettings

KINDS = [ControlPlaneSettings, WorkerSettings, CpuAttnSettings]
Kind = type[ServiceSettings]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__module__.split(".")[1])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    kind: Kind = request.param
    for name in kind.model_fields:
        monkeypatch.delenv(variable(kind, name), raising=False)
    return kind


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "service.toml"


def variable(kind: Kind, name: str) -> str:
    return f"{kind.model_config['env_prefix']}{name}".upper()


def test_every_setting_has_a_default_and_a_description(kind: Kind) -> None:
    kind.load([])
    for name, field in kind.model_fields.items():
        assert not field.is_required(), name
        assert field.description, name


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    kind: Kind, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('listen = "127.0.0.1:1"\nlog_format = "json"\nlog_level = "error"\n')
    monkeypatch.setenv(variable(kind, "listen"), "127.0.0.1:2")
    monkeypatch.setenv(variable(kind, "log_level"), "debug")
    settings = kind.load([f"--config={file}", "--listen=127.0.0.1:3"])
    assert settings.model_dump()["listen"] == "127.0.0.1:3"
    assert (settings.log_level, settings.log_format) == ("debug", "json")


def test_the_environment_may_name_the_file(
    kind: Kind, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('log_format = "json"\n')
    monkeypatch.setenv(variable(kind, "config"), str(file))
    assert kind.load([]).log_format == "json"


def test_an_empty_variable_is_none(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable(kind, "config"), "")
    monkeypatch.setenv(variable(kind, "log_format"), "")
    assert kind.load([]) == kind()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("colour = 'red'", "unknown key 'colour'"),
        ("log-level = 'info'", "unknown key 'log-level'"),
        ("listen = ", "Invalid value"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(kind: Kind, file: Path, text: str, named: str) -> None:
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        kind.load([f"--config={file}"])
    assert str(file) in caught.value.message
    assert named in caught.value.message


def test_a_file_that_is_not_there_is_refused_with_its_name(kind: Kind, file: Path) -> None:
    with pytest.raises(SettingsError, match=str(file)):
        kind.load([f"--config={file}"])


def test_a_bad_value_in_the_file_is_refused_by_name(kind: Kind, file: Path) -> None:
    file.write_text("log_level = 7")
    with pytest.raises(SettingsError, match=r"^log_level: "):
        kind.load([f"--config={file}"])
