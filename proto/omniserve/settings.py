"""Settings of a service: flags > environment > a TOML file > defaults.

Each service has one class that derives from ServiceSettings and reads it once, in its main.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as SourceError

from omniserve.errors import SettingsError


class ServiceSettings(BaseSettings):
    """Frozen; unknown flags, and unknown keys of the file, fail. Subclasses name their prefix."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,  # compose files pass on what nobody has set as empty
        cli_kebab_case=True,
        cli_implicit_flags=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    config: Path | None = None
    """TOML file with settings, by their names with underscores; flags and environment win."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe events to log, on stderr."""
    log_format: Literal["text", "json"] = "text"
    """How to log them: lines for people, or one JSON object a line."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """First wins; the flags' source goes before these by itself."""
        return init_settings, env_settings, _ConfigFile(settings_cls)

    @classmethod
    def load(cls, arguments: Sequence[str]) -> Self:
        """Reads all sources. Raises SettingsError that names the setting; exits on --help."""
        try:
            return cls(_cli_parse_args=list(arguments), _cli_exit_on_error=False)  # type: ignore[call-arg]
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise SettingsError(f"{name}: {first['msg']}", field=name) from error
        except SourceError as error:
            raise SettingsError(str(error)) from error


class _ConfigFile(PydanticBaseSettingsSource):
    """The file that flags or environment name as `config`."""

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            values = tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path}: {error}", field="config") from error
        for key in values:
            if key not in self.settings_cls.model_fields:
                raise SettingsError(f"{path}: unknown key {key!r}", field="config")
        return values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("all values are read at once")
