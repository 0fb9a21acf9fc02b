"""Command line options out of a settings class: one definition of each name and default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_origin

import click
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings
from pydantic_settings import SettingsError as UnreadableError

from omniserve.errors import SettingsError

S = TypeVar("S", bound=BaseSettings)
Command = Callable[..., Any]


def options_of(*kinds: type[BaseSettings]) -> Callable[[Command], Command]:
    """Adds an option for each field of the settings classes; equal names become one option.

    Not for secrets, which everybody on the machine could read in the process list.
    """
    fields = {
        name: (kind, info)
        for kind in kinds
        for name, info in kind.model_fields.items()
        if info.annotation is not SecretStr
    }

    def decorate(command: Command) -> Command:
        for name, (kind, info) in reversed(fields.items()):
            variable = f"{kind.model_config['env_prefix']}{name}".upper()
            default = getattr(info.default, "value", info.default)  # of an enum
            shown = default if default not in ("", ()) else "none"
            command = click.option(
                f"--{name.replace('_', '-')}",
                name,
                multiple=_is_list(info),
                is_flag=info.annotation is bool,
                default=None,
                help=f"{info.description}  [env: {variable}; default: {shown}]",
            )(command)
        return command

    return decorate


def _is_list(field: FieldInfo) -> bool:
    """Its option may be given several times."""
    return get_origin(field.annotation) is tuple


def read(kind: type[S], flags: dict[str, Any]) -> S:
    """Builds settings from the given flags, then the environment, then defaults.

    Raises SettingsError that names the field.
    """
    absent = (None, ())
    given = {k: v for k, v in flags.items() if v not in absent and k in kind.model_fields}
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"{field}: {first['msg']}", field=field) from error
    except UnreadableError as error:  # a list's variable that is no JSON
        raise SettingsError(str(error)) from error
