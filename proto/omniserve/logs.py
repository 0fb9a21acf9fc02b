"""Logs of all services, on stderr: lines for people, or one JSON object a line."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from pythonjsonlogger.json import JsonFormatter

_log = logging.getLogger(__name__)


def configure(service: str, level: str, log_format: str) -> None:
    """Sets up this process. `level` is for our own loggers; libraries log warnings and worse."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(_json(service))
        sys.excepthook = _log_uncaught
    else:
        line = f"%(asctime)s %(levelname)s {service} %(name)s %(message)s"
        handler.setFormatter(logging.Formatter(line))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("omniserve").setLevel(level.upper())


def last_words(service: str, cause: str) -> None:
    """Says in one line why a process ends. A local stack's supervisor reads it where it is text."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.root.handlers):
        _log.critical(cause)
    else:
        print(f"{service}: {cause}", file=sys.stderr, flush=True)


def _json(service: str) -> JsonFormatter:
    return JsonFormatter(
        ["levelname", "name", "message"],
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        static_fields={"service": service},
        timestamp="ts",  # RFC 3339, UTC
    )


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    _log.critical("uncaught %s", kind.__name__, exc_info=(kind, error, trace))
