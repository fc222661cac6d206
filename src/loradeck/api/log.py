"""The log of a server, on the standard library's logging: one line per event, as text or as JSON.

`log.info("loaded %(adapter)s", {"adapter": "poet@2"})` is a message in the text; in JSON its values are fields too.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TextIO

from transformers.utils import logging as transformers_log

from loradeck.api.config import ServerConfig

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # with them, a value could begin a line of its own
PLAIN = re.compile(r"[^\s\"'=]+")


@contextmanager
def logging_to(stream: TextIO, config: ServerConfig) -> Iterator[None]:
    """Write this process's log to a stream: ours as configured, and warnings of other libraries and of Python."""
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else TextFormatter())
    levels = {logging.getLogger("loradeck"): level, logging.getLogger(): max(level, logging.WARNING)}
    before = {logger: logger.level for logger in levels}
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    transformers_log.disable_default_handler()  # which writes to stderr too
    transformers_log.enable_propagation()
    for logger, new in levels.items():
        logger.setLevel(new)
    try:
        yield
    finally:
        for logger, old in before.items():
            logger.setLevel(old)
        transformers_log.disable_propagation()
        transformers_log.enable_default_handler()
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00.123+00:00 INFO loaded poet@2`; values with spaces are quoted, tracebacks are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, and the lines of a traceback."""
        fields = _fields(record)
        quoted = {name: _quoted(value) for name, value in fields.items()}
        message = str(record.msg) % quoted if quoted else record.getMessage()
        lines = [f"{_time(record, ' ')} {record.levelname} {message}"]
        if record.exc_info:
            lines += [f"  {line}" for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", line) for line in lines)


class JsonFormatter(logging.Formatter):
    """One object per line, with `time`, `level`, `logger`, `message`, the event's fields, and any `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        entry = {
            "time": _time(record, "T"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    return record.args if isinstance(record.args, Mapping) else {}


def _quoted(value: Any) -> Any:
    return value if not isinstance(value, str) or PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _time(record: logging.LogRecord, separator: str) -> str:
    return datetime.fromtimestamp(record.created).astimezone().isoformat(separator, "milliseconds")
