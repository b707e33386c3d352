"""Patterns in the syntax of gitignore, matched one path at a time as Git does.

A search that leaves out whole folders needs to know what a pattern says of the folder itself: with the usual ``*``,
``!*/``, ``!*.jpg`` (nothing but JPEG), ``!*/`` takes every folder back in, but nothing that lies in one.

Source: gitignore(5) and, for what a ``*`` and brackets match, wildmatch of Git 2.39. Two things differ: a pattern that
cannot match anything is an error, and ``?`` is a character of UTF-8, not a byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_CLASSES: Final = {
    "alnum": "a-zA-Z0-9",
    "alpha": "a-zA-Z",
    "blank": " \\t",
    "cntrl": "\\x00-\\x1f\\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": "!-/:-@\\[-`{-~",
    "space": " \\t-\\r",
    "upper": "A-Z",
    "xdigit": "0-9a-fA-F",
}

# Two stars stand for folders only where they are all that is between two slashes.
_TOKEN: Final = re.compile(
    r"""(?P<folders> (?<![^/]) \*{2,} / )
      | (?P<rest>    (?<![^/]) \*{2,} $ )
      | (?P<part>    \*+ )
      | (?P<one>     \? )
      | (?P<bracket> \[ )
      | \\ (?P<escaped> . )
      | (?P<plain>   [^\\] )
      | \\""",
    re.DOTALL | re.VERBOSE,
)
_WILDCARDS: Final = {"folders": "(?:.*/)?", "rest": ".+", "part": "[^/]*", "one": "[^/]"}
_BRACKET_ITEM: Final = re.compile(r"\[:(\w+):\]|(?:\\(.)|(.))(?:-(?:\\(.)|([^\]])))?", re.DOTALL)


@dataclass(frozen=True)
class _Pattern:
    regex: re.Pattern[str]
    takes: bool
    is_for_folders: bool
    is_for_paths: bool


@dataclass(frozen=True)
class Patterns:
    """Patterns for paths that start from one folder; the last one that matches decides."""

    patterns: tuple[_Pattern, ...]

    @classmethod
    def parse(cls, lines: Iterable[str]) -> Patterns:
        """Reads patterns, one a line; blank lines and comments are none.

        Raises:
            ValueError: A pattern can match nothing; says which.
        """
        return cls(tuple(pattern for line in lines if (pattern := _parse(line)) is not None))

    def match(self, path: bytes, *, is_folder: bool = False) -> bool | None:
        """Whether a path is taken (true), or left out by a ``!`` (false); ``None`` if no pattern matches it."""
        text = os.fsdecode(path)
        name = text.rpartition("/")[2]
        for pattern in reversed(self.patterns):
            if pattern.is_for_folders and not is_folder:
                continue
            if pattern.regex.fullmatch(text if pattern.is_for_paths else name):
                return pattern.takes
        return None


def _parse(line: str) -> _Pattern | None:
    # A space at the end counts where a backslash says so.
    text = re.sub(r"(?<!\\) +$", "", line)
    if not text or text.startswith("#"):
        return None
    takes = not text.startswith("!")
    body = text.removeprefix("!")
    is_for_folders = body.endswith("/")
    body = body.removesuffix("/")
    try:
        regex = re.compile(_translate(body.removeprefix("/")), re.DOTALL)
    except ValueError as error:
        raise ValueError(f"the pattern {os.fsencode(line)!r} {error}") from error
    return _Pattern(regex, takes, is_for_folders, "/" in body)


def _translate(glob: str) -> str:
    """A pattern without its signs at the beginning and the end, as a regular expression."""
    if not glob:
        raise ValueError("names nothing")
    parts, place = [], 0
    while place < len(glob):
        token = _TOKEN.match(glob, place)
        assert token is not None
        kind, place = token.lastgroup, token.end()
        if kind == "bracket":
            part, place = _translate_bracket(glob, place)
            parts.append(part)
        elif kind in _WILDCARDS:
            parts.append(_WILDCARDS[kind])
        elif kind is None:
            raise ValueError("ends with a backslash")
        else:
            parts.append(re.escape(token[kind]))
    return "".join(parts)


def _translate_bracket(glob: str, place: int) -> tuple[str, int]:
    """What is in a bracket, which opens before a place, as a regular expression, and the place behind it."""
    negation = "^" if glob.startswith(("!", "^"), place) else ""
    place += len(negation)
    first, items = place, []
    # Right after the opening a closing bracket stands for itself.
    while place == first or not glob.startswith("]", place):
        item = _BRACKET_ITEM.match(glob, place)
        if item is None:
            raise ValueError("has a bracket that is not closed")
        place, kind = item.end(), item[1]
        start, end = item[2] or item[3], item[4] or item[5]
        if kind:
            if kind not in _CLASSES:
                raise ValueError(f"has an unknown class [:{kind}:]")
            items.append(_CLASSES[kind])
        elif end is None:
            items.append(re.escape(start))
        elif start <= end:
            items.append(f"{re.escape(start)}-{re.escape(end)}")
    if not items:
        raise ValueError("has a range that ends before it begins")
    # Whatever is in it, a bracket is no slash.
    return f"(?!/)[{negation}{''.join(items)}]", place + 1
