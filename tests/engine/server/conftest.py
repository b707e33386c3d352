from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from support.bad_requests import MAX_IMAGE_BYTES
from support.bundles import make_bundle, tiny_encoder
from support.servers import running, settings_for

from geosurge.server.app import Server


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", encoder=tiny_encoder())


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "other"
    return make_bundle(directory, encoder=tiny_encoder(), seed=1, name="other")


@pytest.fixture
async def live(bundle: Path) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    async with running(settings_for(bundle, max_image_bytes=MAX_IMAGE_BYTES)) as pair:
        yield pair
