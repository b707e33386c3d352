from __future__ import annotations

import logging
from pathlib import Path

import pytest

from geosurge.errors import BundleCorruptError, GeoSurgeError, ImageEmptyError
from geosurge.server.failures import PrivatePaths, exception_to_error, log_unexpected


def test_an_unexpected_exception_leaves_only_its_log_id(caplog: pytest.LogCaptureFixture) -> None:
    secret = ValueError("secret detail")
    with caplog.at_level(logging.ERROR):
        error = exception_to_error(secret)
    assert type(error) is GeoSurgeError
    assert "secret" not in str(error)
    assert "secret detail" in caplog.text
    [record] = caplog.records
    assert str(error).rsplit(" ", 1)[1] == record.__dict__["error_id"]


def test_an_error_raised_on_purpose_is_kept() -> None:
    error = ImageEmptyError("0 bytes")
    assert exception_to_error(error) is error


def test_the_log_has_the_facts_beside_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        error = log_unexpected(ImageEmptyError("nobody caused it"), stage="encode", size=3)
    assert type(error) is GeoSurgeError
    [record] = caplog.records
    assert (record.__dict__["stage"], record.__dict__["size"]) == ("encode", 3)
    assert record.exc_info is not None
    assert "nobody" not in str(error)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("{root}/store/b/level-2.faiss is truncated", "b/level-2.faiss is truncated"),
        ("{root}/geosurge-load-x_1/level-2.faiss is truncated", "level-2.faiss is truncated"),
        ("{root}/real/b/level-2.faiss is truncated", "b/level-2.faiss is truncated"),
        ("the store {root}/store has no bundle 'c'", "the store has no bundle 'c'"),
        ("no bundle of {root}/store was active", "no bundle of the store was active"),
        ("no space in {root}: '{root}/geosurge-load-x'", "no space in the scratch directory: 'geosurge-load-x'"),
    ],
)
def test_errors_name_no_directory_of_the_server(tmp_path: Path, message: str, told: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "real")
    paths = PrivatePaths({tmp_path: "the scratch directory", tmp_path / "store": "the store"})
    error = paths.hide(BundleCorruptError(message.format(root=tmp_path)))
    assert (type(error), str(error)) == (BundleCorruptError, told)


def test_errors_without_a_directory_are_kept(tmp_path: Path) -> None:
    error = BundleCorruptError("b/level-2.faiss is truncated")
    assert PrivatePaths({tmp_path: "the store"}).hide(error) is error
