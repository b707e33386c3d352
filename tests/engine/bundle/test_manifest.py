from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.bundles import make_bundle

from geosurge.bundle import open_bundle, read_manifest
from geosurge.bundle.manifest import (
    MANIFEST_FILE,
    CalibrationInfo,
    FileInfo,
    LevelInfo,
    Manifest,
    decode_embedding,
    encode_embedding,
    parse_manifest,
    render_manifest,
)
from geosurge.bundle.verifying import verify_bundle
from geosurge.errors import (
    BundleCorruptError,
    BundleError,
    BundleSchemaError,
)


def test_any_flipped_byte_of_the_manifest_is_found(copy: Path) -> None:
    content = (copy / MANIFEST_FILE).read_bytes()
    rng = np.random.default_rng(0)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(BundleError):
            parse_manifest(bytes(changed), MANIFEST_FILE)
    (copy / MANIFEST_FILE).write_bytes(content.replace(b'"dimension": 16', b'"dimension": 17'))
    (problem,) = verify_bundle(copy).problems
    assert problem.file == MANIFEST_FILE
    with pytest.raises(BundleCorruptError, match=re.escape(str(copy / MANIFEST_FILE))):
        open_bundle(copy)


def test_a_newer_schema_is_refused_with_the_versions_that_are_read(copy: Path) -> None:
    newer = {"schema_version": 2, "flavour": "a field that does not exist yet"}
    (copy / MANIFEST_FILE).write_text(json.dumps(newer))
    with pytest.raises(BundleSchemaError, match="schema version 2; this engine reads 1"):
        open_bundle(copy)
    (problem,) = verify_bundle(copy).problems
    assert problem.error.reason == "BUNDLE_SCHEMA_UNSUPPORTED"


def test_unknown_and_wrongly_typed_fields_are_refused(whole: Path) -> None:
    manifest = read_manifest(whole)
    for change in ({"extra": 1}, {"dimension": "16"}, {"dimension": 16.5}, {"metric": "l2"}, {"create_time": "today"}):
        fields = manifest.model_dump(mode="json") | change
        with pytest.raises(ValidationError):
            Manifest.model_validate_json(json.dumps(fields))


def test_a_sealed_manifest_with_a_wrong_field_names_the_field(whole: Path) -> None:
    unchecked = read_manifest(whole).model_copy(update={"default_beam_width": 0})
    _, data = render_manifest(unchecked)
    with pytest.raises(BundleCorruptError, match="default_beam_width"):
        parse_manifest(data, MANIFEST_FILE)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/.", "", ".", "a\\b", "a\x00", "manifest.json"]
)
def test_paths_that_leave_the_bundle_are_refused(whole: Path, path: str) -> None:
    manifest = read_manifest(whole)
    info = FileInfo(size=1, sha256="0" * 64)
    with pytest.raises(ValidationError):
        Manifest.model_validate(dict(manifest) | {"files": manifest.files | {path: info}})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperatures", (0.1, 0.1), "3 levels, but 2 temperatures"),
        ("temperatures", (0.1, 0.1, -1.0), "greater than 0"),
        ("temperatures", (0.1, 0.1, float("nan")), "finite"),
        ("name", "../up", "name"),
        ("name", ".hidden", "name"),
        ("name", "", "name"),
        ("encoder", None, "golden_images need an encoder"),
        ("dimension", 8, "dimension 8"),
        ("create_time", datetime(2025, 1, 1), "timezone"),  # noqa: DTZ001
        ("levels", (), "at least 1 item"),
    ],
)
def test_manifests_that_contradict_themselves_are_refused(whole: Path, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Manifest.model_validate(dict(read_manifest(whole)) | {field: value})


def test_levels_are_numbered_from_one(whole: Path) -> None:
    manifest = read_manifest(whole)
    with pytest.raises(ValidationError, match="numbered from 1"):
        Manifest.model_validate(dict(manifest) | {"levels": manifest.levels[::-1]})
    with pytest.raises(ValidationError, match="less than or equal to 30"):
        LevelInfo(level=1, cells=1, file="level-1.faiss", storage="fp32", s2_level_min=31)


@pytest.mark.parametrize(
    ("levels", "masses", "message"),
    [
        ((0.0, 1.0), (0.5,), "2 confidence_levels but 1 posterior_masses"),
        ((0.0, 0.9, 0.5, 1.0), (0.0, 0.5, 0.9, 1.0), "confidence_levels must ascend from 0 to 1"),
        ((0.0, 0.5, 0.5, 1.0), (0.0, 0.5, 0.9, 1.0), "confidence_levels must ascend from 0 to 1"),
        ((0.1, 0.5, 0.9, 0.95), (0.1, 0.5, 0.9, 0.95), "confidence_levels must ascend from 0 to 1"),
        ((0.0, 0.5, 1.0), (0.0, 0.9, 0.5), "posterior_masses must lie in .* and never decrease"),
        ((0.0, 1.0), (0.0, 1.1), "posterior_masses must lie in"),
    ],
)
def test_a_manifest_has_no_calibration_that_inference_refuses(
    levels: tuple[float, ...], masses: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        CalibrationInfo(
            temperature=1.0,
            confidence_levels=levels,
            posterior_masses=masses,
            expected_calibration_error=0.01,
            sample_count=10,
            source="test",
        )


def test_times_are_kept_in_utc(tmp_path: Path) -> None:
    time = datetime(2025, 6, 1, 1, 30, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    path = make_bundle(tmp_path / "tiny", create_time=time)
    assert read_manifest(path).create_time == datetime(2025, 5, 31, 20, 0, tzinfo=UTC)
    assert '"create_time": "2025-05-31T20:00:00Z"' in (path / MANIFEST_FILE).read_text()


def test_rendering_and_parsing_are_inverse(whole: Path) -> None:
    content = (whole / MANIFEST_FILE).read_bytes()
    manifest = parse_manifest(content, MANIFEST_FILE)
    assert render_manifest(manifest) == (manifest, content)


@settings(deadline=None)
@given(text=st.text(max_size=60), scale=st.floats(0.01, 10))
def test_any_words_and_numbers_survive_the_manifest(whole: Path, text: str, scale: float) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    manifest = read_manifest(whole)
    changed = manifest.model_copy(update={"description": text, "temperatures": (scale, scale / 3, scale / 7)})
    sealed, data = render_manifest(changed)
    assert parse_manifest(data, MANIFEST_FILE) == sealed
    assert sealed.description == text
    assert sealed.temperatures == (scale, scale / 3, scale / 7)


def test_words_that_look_like_the_self_check_do_not_confuse_it(whole: Path) -> None:
    trick = '"manifest_sha256": "' + "0" * 64 + '"'
    sealed, data = render_manifest(read_manifest(whole).model_copy(update={"description": trick}))
    assert parse_manifest(data, MANIFEST_FILE).description == trick
    assert sealed.manifest_sha256 in data.decode()


@settings(deadline=None)
@given(st.lists(st.floats(width=32), max_size=20))
def test_embeddings_survive_base64(values: list[float]) -> None:
    expected = np.array(values, np.float32)
    np.testing.assert_array_equal(decode_embedding(encode_embedding(expected)), expected)


@pytest.mark.parametrize("text", ["====", "not base64!", "AAA=", "é"])
def test_what_is_no_embedding_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"embedding|ASCII"):
        decode_embedding(text)


def test_reading_a_manifest_loads_neither_faiss_nor_torch_nor_pillow(whole: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import geosurge.store; from geosurge.bundle import open_bundle;"
        "open_bundle(Path(sys.argv[1]));"
        "print([name for name in ('faiss', 'torch', 'PIL', 'transformers', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(whole)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
