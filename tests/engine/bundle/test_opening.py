from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.bundles import BUNDLE_FILES

from geosurge.bundle import open_bundle
from geosurge.bundle.manifest import (
    MANIFEST_FILE,
)
from geosurge.bundle.verifying import verify_bundle
from geosurge.errors import (
    BundleCorruptError,
    BundleNotFoundError,
    BundlePartialError,
)


@pytest.mark.parametrize("file", BUNDLE_FILES)
def test_a_missing_file_makes_a_bundle_partial(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(BundlePartialError, match=re.escape(file)):
        open_bundle(copy)
    assert [problem.file for problem in verify_bundle(copy).problems] == [file]


@pytest.mark.parametrize("file", BUNDLE_FILES)
def test_a_file_of_another_size_is_corrupt(copy: Path, file: str) -> None:
    content = (copy / file).read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content + b"\n"):
        (copy / file).write_bytes(changed)
        with pytest.raises(BundleCorruptError, match=re.escape(file)):
            open_bundle(copy)
        assert [problem.file for problem in verify_bundle(copy).problems] == [file]


def test_no_manifest_no_directory_no_json(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="nowhere"):
        open_bundle(tmp_path / "nowhere")
    for content in (b"", b"{", b"[]", b"\xff", b"null", b"{}", b'{"schema_version": 1}', b'{"schema_version": "1"}'):
        (copy / MANIFEST_FILE).write_bytes(content)
        with pytest.raises(BundleCorruptError, match=MANIFEST_FILE):
            open_bundle(copy)
    (copy / MANIFEST_FILE).unlink()
    with pytest.raises(BundlePartialError, match=MANIFEST_FILE):
        open_bundle(copy)
    assert [problem.file for problem in verify_bundle(copy).problems] == [MANIFEST_FILE]


def test_a_linked_directory_inside_a_bundle_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "encoder").rename(tmp_path / "encoder")
    (copy / "encoder").symlink_to(tmp_path / "encoder")
    with pytest.raises(BundleCorruptError, match="is a link"):
        open_bundle(copy)


def test_a_bundle_may_be_reached_through_a_link(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(whole)
    open_bundle(tmp_path / "link")
    assert verify_bundle(tmp_path / "link").ok
