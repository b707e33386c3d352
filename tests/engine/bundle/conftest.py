from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.bundles import make_bundle, tiny_encoder


@pytest.fixture(scope="package")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an encoder, which no test may change."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "whole", encoder=tiny_encoder(), name="whole")


@pytest.fixture(scope="package")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same shape with everything else different."""
    encoder = tiny_encoder(seed=1)
    return make_bundle(tmp_path_factory.mktemp("bundles") / "other", encoder=encoder, seed=9, name="other")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")
