"""Paths as the system has them, as bytes: their parts, how they are shown, and how files are opened by them."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from typing import Final

from geosurge.errors import InputNotReadableError

# Undecodable bytes arrive as lone surrogates. Control characters are escaped because a name with a line break or an
# escape sequence must not break a log line, a terminal or an XML file.
_ESCAPED: Final = re.compile(r"[\\\x00-\x1f\x7f-\x9f\udc80-\udcff]")

_ADVICE: Final = {
    errno.ENOENT: "it has gone since it was listed, or the link to it leads nowhere",
    errno.ENOTDIR: "what should be a folder on the way to it is a file",
    errno.EACCES: "give the user of this run the permission to read it",
    errno.EPERM: "give the user of this run the permission to read it",
    errno.ELOOP: "remove the link that leads back to itself",
    errno.ENAMETOOLONG: "shorten its path",
}


def shown(path: bytes) -> str:
    r"""A path as people and outputs see it; different paths never look the same.

    Args:
        path: The path.

    Returns:
        The path as text: what is not UTF-8, and control characters, as ``\xNN``, a backslash as ``\\``.
    """
    return _ESCAPED.sub(_escape, path.decode("utf-8", "surrogateescape"))


def extension(path: bytes) -> bytes:
    """The extension of a path in lower case, without its dot; empty if there is none, as in ``.hidden``."""
    stem, _, end = path.rpartition(b"/")[2].rpartition(b".")
    return end.lower() if stem else b""


def join(folder: bytes, name: bytes) -> bytes:
    """The path of what lies in a folder."""
    return b"%b/%b" % (folder.rstrip(b"/"), name)


def within(path: bytes, folder: bytes) -> bytes | None:
    """The rest of a path below a folder, empty for the folder itself; ``None`` if it does not lie there."""
    if path == folder:
        return b""
    prefix = join(folder, b"")
    return path[len(prefix) :] if path.startswith(prefix) else None


def is_hidden(path: bytes) -> bool:
    """Whether a part of a path begins with a dot."""
    return any(part.startswith(b".") and part not in {b".", b".."} for part in path.split(b"/"))


def open_regular(path: bytes) -> io.BufferedReader:
    """Opens a file to be read, and nothing that would keep its reader waiting.

    Raises:
        OSError: It cannot be read, or is a folder, a pipe, a socket or a device.
    """
    # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return io.BufferedReader(io.FileIO(descriptor))
    except BaseException:
        os.close(descriptor)
        raise


def not_readable(path: bytes, error: OSError | ValueError) -> InputNotReadableError:
    """The error that says which path the system refuses, why, and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    advice = _ADVICE.get(number or 0, "check the disk and the file")
    return InputNotReadableError(f"cannot read {shown(path)}: {why}; {advice}")


def _escape(match: re.Match[str]) -> str:
    if match.group() == "\\":
        return "\\\\"
    return "".join(f"\\x{byte:02x}" for byte in match.group().encode("utf-8", "surrogateescape"))
