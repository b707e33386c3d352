"""Log lines, for people or for machines.

A record may carry fields (``extra``) beside its message. As text they follow it as ``key=value``; as JSON they are keys
beside ``time``, ``level``, ``logger`` and ``message``. A record that is logged while a call is answered says which: it
has the call's ``request_id`` and ``index_version``.

Whatever a client sends, it cannot write a line that looks like a record: JSON is ASCII on one line; text escapes
control characters, and indents every line of a record (of a traceback, say) but its first.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any, Final, Literal

from geosurge.server.interceptors import current_call, is_lost_call

LogFormat = Literal["text", "json"]

_STANDARD_KEYS: Final = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}
_PLAIN_VALUE: Final = re.compile(r"[\w./:@%+-]+")
_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_UNSENT_STATUS: Final = "ExecuteBatchError raised in core by servicer method"


def configure_logging(level: str, log_format: LogFormat) -> None:
    """Sends log records to standard error; does nothing in a process that has configured logging already.

    Args:
        level: Name of the least severe level that is logged.
        log_format: What lines look like.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    handler.addFilter(add_call)
    handler.addFilter(is_informative)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def add_call(record: logging.LogRecord) -> bool:
    """A filter that adds request id and index version to records logged while a call is answered; it drops none."""
    call = current_call()
    if call.method:
        # What the record itself says comes first: a call may be about another version than the one that answers it.
        fields = call.fields()
        about = {key: fields[key] for key in ("request_id", "index_version")}
        record.__dict__ |= {key: value for key, value in about.items() if key not in record.__dict__}
    return True


def is_informative(record: logging.LogRecord) -> bool:
    """A filter that drops what gRPC logs when it cannot send a stream's status because it has refused a message of it.

    The client has been told, the call's own line is logged, and no other failure of gRPC or the engine looks like it.
    """
    lost = record.name == "grpc._cython.cygrpc" and str(record.msg).startswith(_UNSENT_STATUS)
    return not (lost and record.exc_info is not None and is_lost_call(record.exc_info[1]))


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, fields."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line without what is below it."""
        fields = "".join(f" {key}={_value(value)}" for key, value in _fields(record).items())
        return super().formatMessage(record) + fields

    def format(self, record: logging.LogRecord) -> str:
        """The line, and below it a traceback where there is one."""
        text = _CONTROL.sub(lambda match: ascii(match[0])[1:-1], super().format(record))
        return text.replace("\n", "\n    ")


class JsonFormatter(logging.Formatter):
    """One JSON object (RFC 8259, ASCII) a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # A field cannot take the place of one of these keys, which come first.
        return json.dumps(line | _fields(record) | line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD_KEYS}


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else repr(text)
