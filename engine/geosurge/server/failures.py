"""What clients are told of failures: nothing that the engine did not mean to say, and no path of the server."""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

from geosurge.errors import GeoSurgeError

logger = logging.getLogger(__name__)

MAX_LOGGED_LENGTH = 200
"""Characters of what a client chose that are logged."""

PRIVATE_COPY_PREFIX = "geosurge-load-"
"""Start of the names of the directories that versions are copied into."""


class PrivatePaths:
    """Directories of the server, which clients know only by what they are for."""

    def __init__(self, names: Mapping[Path, str]) -> None:
        """Takes what each directory is called, such as ``the store``."""
        forms = {form: name for path, name in names.items() for form in (os.path.realpath(path), str(path.absolute()))}
        # One may be inside another; the root hides nothing, and stands in every path.
        hidden = [(form, name) for form, name in forms.items() if form != os.sep]
        self._names = sorted(hidden, key=lambda item: -len(item[0]))

    def hide(self, error: GeoSurgeError) -> GeoSurgeError:
        """The error as a client may read it: files are named from below their directory, which begins with a version.

        An error that names no directory is returned as it is.
        """
        message = str(error)
        for path, name in self._names:
            message = re.sub(rf"{re.escape(path)}/(?:{PRIVATE_COPY_PREFIX}[^/]*/)?", "", message)
            message = message.replace(f"{name} {path}", name).replace(path, name)
        return error if message == str(error) else type(error)(message)


def exception_to_error(exception: Exception, request_id: str = "") -> GeoSurgeError:
    """Turns whatever was raised into an error that may leave the process.

    An error raised on purpose is returned as it is. Anything else is logged with its traceback under a new id, and only
    that id is passed on.

    Args:
        exception: What was raised.
        request_id: Id of the stream's item that failed; a failed call is known to the log.
    """
    if isinstance(exception, GeoSurgeError):
        return exception
    return log_unexpected(exception, **({"request_id": request_id[:MAX_LOGGED_LENGTH]} if request_id else {}))


def log_unexpected(exception: Exception, **facts: str | int) -> GeoSurgeError:
    """Logs an exception with its traceback under a new id; returns the error that passes on only that id.

    Args:
        exception: What was raised.
        facts: What the log says beside it.
    """
    error_id = uuid.uuid4().hex
    logger.error("unexpected failure", extra={"error_id": error_id, **facts}, exc_info=exception)
    return GeoSurgeError(f"the engine failed; the server logged the cause as {error_id}")
