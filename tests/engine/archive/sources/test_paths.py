from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geosurge.archive.sources.paths import extension, is_hidden, join, not_readable, open_regular, shown, within


def unescaped(text: str) -> bytes:
    """The bytes that a shown path stands for, by what its description says."""
    parts = re.split(r"\\(\\|x[0-9a-f]{2})", text)
    escaped = [b"\\" if part == "\\" else bytes.fromhex(part[1:]) for part in parts[1::2]]
    plain = [part.encode() for part in parts[::2]]
    return b"".join(a + b for a, b in zip(plain, [*escaped, b""], strict=True))


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_different_paths_never_look_the_same(path: bytes) -> None:
    assert unescaped(shown(path)) == path


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\")))
def test_a_plain_name_is_shown_as_it_is(name: str) -> None:
    assert shown(name.encode()) == name


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"caf\xe9.jpg", "caf\\xe9.jpg"),
        (b"two\nlines", "two\\x0alines"),
        (b"\x1b[31mred", "\\x1b[31mred"),
        (b"C:\\a", "C:\\\\a"),
        (b"\\xe9", "\\\\xe9"),
        ("a\x85b".encode(), "a\\xc2\\x85b"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
    ],
)
def test_what_cannot_be_shown_is_escaped(path: bytes, expected: str) -> None:
    assert shown(path) == expected


def test_parts_of_paths() -> None:
    assert [extension(path) for path in (b"a.JPG", b"/x.y/a", b".jpg", b"/b/.jpg", b"a.tar.gz", b"a.")] == [
        *(b"jpg", b"", b"", b"", b"gz", b"")
    ]
    assert (join(b"/", b"a"), join(b"/a", b"b"), join(b"/a/", b"b")) == (b"/a", b"/a/b", b"/a/b")
    assert within(b"/a/b/c", b"/a") == b"b/c"
    assert within(b"/a", b"/") == b"a"
    assert within(b"/a", b"/a") == b""
    assert within(b"/ab", b"/a") is None
    assert [is_hidden(path) for path in (b"a/.b/c", b"./a", b"../a", b"a.b", b"..a")] == [
        True,
        False,
        False,
        False,
        True,
    ]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    os.mkfifo(tmp_path / "pipe")
    with open_regular(os.fsencode(tmp_path / "file")) as file:
        assert file.read() == b"content"
    # Nobody writes to the pipe: an opening that waits for that would never end.
    for name in ("pipe", "", "missing"):
        with pytest.raises(OSError, match=r"not a regular file|No such file"):
            open_regular(os.fsencode(tmp_path / name))


def test_errors_name_the_path_the_reason_and_what_to_do() -> None:
    for number in (errno.ENOENT, errno.EACCES, errno.ELOOP, errno.EIO):
        message = str(not_readable(b"/a/\xff.jpg", OSError(number, os.strerror(number))))
        assert message.startswith(f"cannot read /a/\\xff.jpg: {os.strerror(number)}; ")
    assert "embedded null byte" in str(not_readable(b"a\0b", ValueError("embedded null byte")))
