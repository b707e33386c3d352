from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bundles import make_bundle, tiny_encoder
from support.clients import MAX_IMAGE_BYTES
from support.servers import background_server, settings_for

from geosurge.client import Client


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", encoder=tiny_encoder())


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    with background_server(settings_for(bundle, max_image_bytes=MAX_IMAGE_BYTES)) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client
