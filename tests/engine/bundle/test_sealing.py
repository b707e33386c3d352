from __future__ import annotations

from pathlib import Path

import pytest

from geosurge.bundle import finish_bundle, read_manifest
from geosurge.bundle.manifest import (
    MANIFEST_FILE,
)
from geosurge.bundle.verifying import verify_bundle
from geosurge.errors import (
    BundleInconsistentError,
)


def test_finishing_again_changes_nothing(copy: Path) -> None:
    before = (copy / MANIFEST_FILE).read_bytes()
    (copy / f".{MANIFEST_FILE}.partial").write_text("left over from a power cut")
    assert finish_bundle(copy, read_manifest(copy)) == read_manifest(copy)
    assert (copy / MANIFEST_FILE).read_bytes() == before
    assert verify_bundle(copy).ok


def test_finishing_refuses_links_and_missing_files(copy: Path, tmp_path: Path) -> None:
    manifest = read_manifest(copy)
    (copy / "level-3.faiss").rename(tmp_path / "elsewhere")
    with pytest.raises(BundleInconsistentError, match=r"no level-3\.faiss"):
        finish_bundle(copy, manifest)
    assert not (copy / MANIFEST_FILE).exists()
    for target, link in (("elsewhere", "level-3.faiss"), ("copy/encoder", "other-encoder")):
        (copy / link).symlink_to(tmp_path / target)
        with pytest.raises(BundleInconsistentError, match="is a link"):
            finish_bundle(copy, manifest)
        (copy / link).unlink()
