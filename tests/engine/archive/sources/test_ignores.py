from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geosurge.archive.sources import scan
from geosurge.archive.sources.ignores import IGNORE_FILE, IgnoreRules
from geosurge.archive.sources.patterns import Patterns
from geosurge.errors import InputNotReadableError

FOLDERS = ("", "a", "b", "a/a", "a/b", "a/keep", "b/a/keep", "keep", "keep/a/b", "z.jpg")
NAMES = ("x.jpg", "y.jpg", "X.JPG", "a.jpg")

TAKE = (
    *("*", "**", "*.jpg", "a", "b", "keep", "a/", "keep/", "/a", "/keep/", "a/*", "a/**", "a/**/", "**/a", "**/keep/"),
    *("a/**/b", "x.jpg", "z.jpg/", "*/", "*/x.jpg", "[xy].jpg", "[!x].jpg", "?", "a/b", "/*/", "*/**", "b/**/x.jpg"),
    *("# a comment", "", "\\#", "X.*", "a.jp\\g"),
)
LEAVE = (
    *("!*/", "!**/", "!a", "!b/", "!/keep/", "!keep", "!**/a", "!a/*", "!a/**", "!**", "!*"),
    *("!*.jpg", "!x.jpg", "!a/x.jpg", "!/y.jpg", "!**/x.jpg", "!keep/*.jpg", "!a/**/y.jpg"),
)
LINES = st.lists(st.sampled_from(TAKE) | st.sampled_from(LEAVE), max_size=5)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with many files in many folders."""
    if shutil.which("git") is None and not os.environ.get("CI"):
        pytest.skip("git, whose own reading of ignore files is what is compared with, is not installed")
    root = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            (root / folder / name).touch()
    subprocess.run(["git", "init", "--quiet", root], check=True)
    return root


def write_rules(root: Path, rules: Sequence[tuple[str, Sequence[str]]]) -> None:
    for old in root.rglob(IGNORE_FILE):
        old.unlink()
    for folder, lines in rules:
        (root / folder / IGNORE_FILE).write_text("\n".join(lines))


def left_by_git(root: Path) -> list[bytes]:
    command = ["git", "ls-files", "--others", "-z", f"--exclude-per-directory={IGNORE_FILE}"]
    output = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    names = [name for name in output.split(b"\0") if name and not name.endswith(IGNORE_FILE.encode())]
    return sorted(os.fsencode(root) + b"/" + name for name in names)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outer=LINES, inner=LINES, folder=st.sampled_from([folder for folder in FOLDERS if folder]))
def test_ignore_files_mean_what_they_mean_to_git(tree: Path, outer: list[str], inner: list[str], folder: str) -> None:
    write_rules(tree, [("", outer), (folder, inner)])
    assert sorted(found.path for found in scan([tree])) == left_by_git(tree)


@pytest.mark.parametrize(
    ("lines", "is_kept"),
    [
        # All but one kind.
        (["*", "!*/", "!y.jpg"], lambda name: name.endswith("/y.jpg")),
        # All but one folder, and all but what lies in it.
        (["/*", "!/keep/"], lambda name: name.startswith("/keep/")),
        (["keep/*", "!keep/x.jpg"], lambda name: not name.startswith("/keep/") or name == "/keep/x.jpg"),
        # What lies in an ignored folder stays there.
        (["keep/", "!x.jpg"], lambda name: "/keep/" not in name),
    ],
)
def test_common_ways_to_write_ignore_files(tree: Path, lines: list[str], is_kept: Callable[[str], bool]) -> None:
    write_rules(tree, [("", lines)])
    names = [f"/{folder}/{name}".replace("//", "/") for folder in FOLDERS for name in NAMES]
    found = {item.name.removeprefix(str(tree)) for item in scan([tree])}
    assert found == {name for name in names if is_kept(name)}


def test_names_that_are_no_text_can_be_ignored(tmp_path: Path) -> None:
    for name in (b"caf\xe9.jpg", b"th\xe9.jpg", b"two\nlines/x.jpg", b"x.jpg\n"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / IGNORE_FILE).write_bytes(b"\xef\xbb\xbfcaf\xe9.*\r\nx.jpg\r\n")
    assert [found.path for found in scan([tmp_path])] == [os.fsencode(tmp_path) + b"/th\xe9.jpg"]
    # The name that ends with a line break is another than the one that is ignored.
    assert not Patterns.parse(["x.jpg"]).match(b"x.jpg\n")


def test_a_folder_whose_ignore_file_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    for name, make in {
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "pattern": lambda path: path.write_text("a\\"),
        "large": lambda path: path.write_bytes(b"#" * 1_000_001),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "private.jpg").touch()
        make(tmp_path / name / IGNORE_FILE)
    (tmp_path / "public.jpg").touch()
    found = list(scan([tmp_path]))
    assert [Path(item.name).name for item in found] == ["folder", "large", "pattern", "pipe", "public.jpg"]
    assert all(isinstance(item.error, InputNotReadableError) and IGNORE_FILE in str(item.error) for item in found[:4])


def test_the_innermost_file_decides(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / IGNORE_FILE).write_text("*.jpg\n")
    (tmp_path / "a" / IGNORE_FILE).write_text("!x.jpg\n")
    outer = IgnoreRules().within(os.fsencode(tmp_path), b"")
    inner = outer.within(os.fsencode(tmp_path / "a"), b"a/")
    assert outer.ignores(b"a/x.jpg", is_folder=False)
    assert not inner.ignores(b"a/x.jpg", is_folder=False)
    assert inner.ignores(b"a/y.jpg", is_folder=False)
    assert not inner.ignores(b"a/y.png", is_folder=False)
