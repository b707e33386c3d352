from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.bundles import BEAM_WIDTH, geographic_embeddings, make_bundle, make_levels, tiny_encoder

from geosurge.bundle import (
    MANIFEST_FILE,
    TREE_FILE,
    FileInfo,
    Manifest,
    check_encoder,
    check_index,
    check_listed_files,
    finish_bundle,
    open_bundle,
    read_manifest,
    record_golden_queries,
    verify_bundle,
)
from geosurge.cells import CellTree
from geosurge.encoder import ImageEncoder
from geosurge.errors import (
    BundleCorruptError,
    BundleEncoderMismatchError,
    BundleError,
    BundleInconsistentError,
    BundleNotFoundError,
    BundlePartialError,
    BundleSchemaError,
)
from geosurge.manifest import (
    CalibrationInfo,
    LevelInfo,
    decode_embedding,
    encode_embedding,
    parse_manifest,
    render_manifest,
)
from geosurge.search import HierarchicalIndex

FILES = [
    "cells.lmdb/data.mdb",
    "encoder/config.json",
    "encoder/model.safetensors",
    "golden/1.png",
    "level-1.faiss",
    "level-2.faiss",
    "level-3.faiss",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an encoder, which no test may change."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "whole", encoder=tiny_encoder(), name="whole")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same shape with everything else different."""
    encoder = tiny_encoder(seed=1)
    return make_bundle(tmp_path_factory.mktemp("bundles") / "other", encoder=encoder, seed=9, name="other")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def refinish(path: Path, **changes: Any) -> Path:
    """Makes hashes and manifest fit whatever was changed, as a builder with a bug would."""
    finish_bundle(path, read_manifest(path).model_copy(update=changes))
    return path


def test_a_bundle_opens_and_verifies(whole: Path) -> None:
    bundle = open_bundle(whole)
    assert bundle.path == whole
    assert [path.name for path in bundle.level_paths] == ["level-1.faiss", "level-2.faiss", "level-3.faiss"]
    assert bundle.tree_path == whole / "cells.lmdb"
    assert bundle.encoder_path == whole / "encoder"
    assert sorted(bundle.manifest.files) == FILES
    assert bundle.manifest.golden_queries
    assert bundle.manifest.golden_images
    report = verify_bundle(whole)
    assert report.ok, report.problems


def test_a_bundle_without_encoder_verifies(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny")
    assert open_bundle(path).encoder_path is None
    assert verify_bundle(path).ok


@pytest.mark.parametrize("storage", ["fp16", "sq8"])
def test_golden_queries_survive_compressed_storage(tmp_path: Path, storage: Any) -> None:
    path = make_bundle(tmp_path / "tiny", storage=storage, level_counts=(3, 3, 8, 60))
    assert read_manifest(path).golden_queries
    assert verify_bundle(path).ok


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_byte_is_found_in_its_file(copy: Path, file: str) -> None:
    content = (copy / file).read_bytes()
    rng = np.random.default_rng(len(file))
    for position in (0, len(content) - 1, *rng.integers(0, len(content), 6).tolist()):
        changed = bytearray(content)
        changed[position] ^= 1 << int(rng.integers(8))
        (copy / file).write_bytes(changed)
        problems = verify_bundle(copy).problems
        assert [problem.file for problem in problems] == [file]
        assert isinstance(problems[0].error, BundleCorruptError)
        assert file in str(problems[0].error)
    (copy / file).write_bytes(content)
    assert verify_bundle(copy).ok


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


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_makes_a_bundle_partial(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(BundlePartialError, match=re.escape(file)):
        open_bundle(copy)
    assert [problem.file for problem in verify_bundle(copy).problems] == [file]


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_size_is_corrupt(copy: Path, file: str) -> None:
    content = (copy / file).read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content + b"\n"):
        (copy / file).write_bytes(changed)
        with pytest.raises(BundleCorruptError, match=re.escape(file)):
            open_bundle(copy)
        assert [problem.file for problem in verify_bundle(copy).problems] == [file]


def test_all_damaged_files_are_named(copy: Path) -> None:
    (copy / "golden/1.png").unlink()
    (copy / "level-2.faiss").write_bytes(b"")
    with (copy / TREE_FILE).open("r+b") as file:
        file.write(b"x")
    assert {problem.file for problem in verify_bundle(copy).problems} == {"golden/1.png", "level-2.faiss", TREE_FILE}


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


def test_links_and_unlisted_files_are_problems(copy: Path, tmp_path: Path) -> None:
    (copy / "level-3.faiss").rename(tmp_path / "elsewhere")
    (copy / "level-3.faiss").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleCorruptError, match="is a link"):
        open_bundle(copy)
    assert [problem.file for problem in verify_bundle(copy).problems] == ["level-3.faiss"]
    (copy / "level-3.faiss").unlink()
    (tmp_path / "elsewhere").rename(copy / "level-3.faiss")

    (copy / "encoder" / "weights.pkl").write_bytes(b"\x80\x04N.")
    open_bundle(copy)
    (problem,) = verify_bundle(copy).problems
    assert problem.file == "encoder/weights.pkl"
    assert "not in the manifest" in str(problem.error)


def test_a_linked_directory_inside_a_bundle_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "encoder").rename(tmp_path / "encoder")
    (copy / "encoder").symlink_to(tmp_path / "encoder")
    with pytest.raises(BundleCorruptError, match="is a link"):
        open_bundle(copy)


def test_a_bundle_may_be_reached_through_a_link(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(whole)
    open_bundle(tmp_path / "link")
    assert verify_bundle(tmp_path / "link").ok


def foreign_level(path: Path, other: Path) -> Path:
    # The same number of vectors, but in other families.
    shutil.copy(other / "level-2.faiss", path / "level-2.faiss")
    return refinish(path)


def foreign_tree(path: Path, other: Path) -> Path:
    shutil.copy(other / TREE_FILE, path / TREE_FILE)
    return refinish(path)


def smaller_tree(path: Path, other: Path) -> Path:
    smaller = make_bundle(path.parent / "smaller", level_counts=(4, 9, 19))
    shutil.copy(smaller / TREE_FILE, path / TREE_FILE)
    return refinish(path)


def fewer_vectors(path: Path, other: Path) -> Path:
    fewer = make_bundle(path.parent / "fewer", level_counts=(4, 9, 19))
    shutil.copy(fewer / "level-3.faiss", path / "level-3.faiss")
    return refinish(path)


def other_dimension(path: Path, other: Path) -> Path:
    wide = make_bundle(path.parent / "wide", dimension=24)
    for level in (1, 2, 3):
        shutil.copy(wide / f"level-{level}.faiss", path)
    return refinish(path)


def one_other_dimension(path: Path, other: Path) -> Path:
    wide = make_bundle(path.parent / "wide", dimension=24)
    shutil.copy(wide / "level-2.faiss", path)
    return refinish(path)


def other_vectors(path: Path, other: Path) -> Path:
    # The same tree with other numbers in it: only the golden queries can tell.
    strange = make_bundle(path.parent / "strange", seed=0, dimension=16, storage="sq8")
    shutil.copy(strange / "level-3.faiss", path)
    return refinish(path)


def other_golden_leaf(path: Path, other: Path) -> Path:
    query, *rest = read_manifest(path).golden_queries
    changed = query.model_copy(update={"leaves": (query.leaves[1], query.leaves[0], *query.leaves[2:])})
    return refinish(path, golden_queries=(changed, *rest))


def other_golden_score(path: Path, other: Path) -> Path:
    query, *rest = read_manifest(path).golden_queries
    changed = query.model_copy(update={"scores": (query.scores[0] + 0.05, *query.scores[1:])})
    return refinish(path, golden_queries=(*rest, changed))


@pytest.mark.parametrize(
    ("change", "file", "message"),
    [
        (foreign_level, "level-2.faiss", r"other children of cell \d+ of level 1 than the cell tree"),
        (foreign_tree, "level-2.faiss", r"other children of cell \d+ of level 1 than the cell tree"),
        (smaller_tree, TREE_FILE, r"\(4, 9, 19\) cells on its levels, but the manifest says \(4, 9, 20\)"),
        (fewer_vectors, "level-3.faiss", "19 vectors, but level 3 has 20 cells"),
        (other_dimension, "level-1.faiss", "vectors of 24 values, but the manifest says 16"),
        (one_other_dimension, "level-2.faiss", "24"),
        (other_vectors, "level-3.faiss", "answers golden query 0"),
        (other_golden_leaf, "level-3.faiss", "a full scan answers golden query 0"),
        (other_golden_score, "level-3.faiss", "a full scan answers golden query 2"),
    ],
)
def test_parts_that_do_not_belong_together_are_found(
    copy: Path, other: Path, change: Callable[[Path, Path], Path], file: str, message: str
) -> None:
    problems = verify_bundle(change(copy, other)).problems
    assert problems
    assert {problem.file for problem in problems} == {file}
    assert isinstance(problems[0].error, BundleInconsistentError)
    assert re.search(message, str(problems[0].error))


def test_a_bundle_without_golden_answers_is_a_problem(copy: Path) -> None:
    for changes, missing in (
        ({"golden_queries": ()}, ["golden queries"]),
        ({"golden_images": ()}, ["golden queries", "golden images"]),
    ):
        problems = verify_bundle(refinish(copy, **changes)).problems
        assert [problem.file for problem in problems] == ["manifest.json"] * len(missing)
        for problem, what in zip(problems, missing, strict=True):
            assert f"has no {what}" in str(problem.error)


def test_a_bundle_that_answers_embeddings_needs_no_golden_images(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "blind")
    assert not read_manifest(path).golden_images
    assert verify_bundle(path).ok


def test_cells_of_another_kind_than_the_manifest_says_are_found(copy: Path) -> None:
    (problem,) = verify_bundle(refinish(copy, cell_kind="h3")).problems
    assert problem.file == TREE_FILE
    assert "has S2 cells, but the manifest says cell_kind 'h3'" in str(problem.error)


def test_checking_an_index_keeps_no_decoded_leaves(whole: Path) -> None:
    bundle = open_bundle(whole)
    with CellTree.open(bundle.tree_path) as tree, HierarchicalIndex.open(bundle.level_paths) as index:
        check_index(bundle, tree, index)
        assert index._leaf_matrix is None


def test_the_content_of_listed_files_is_checked(copy: Path) -> None:
    (copy / "notes.txt").write_text("not in the manifest, and no matter to a reader")
    check_listed_files(open_bundle(copy))
    data = bytearray((copy / "level-2.faiss").read_bytes())
    data[-1] ^= 1
    (copy / "level-2.faiss").write_bytes(data)
    with pytest.raises(BundleCorruptError, match=r"level-2\.faiss has another SHA-256"):
        check_listed_files(open_bundle(copy))


def test_a_tree_that_contradicts_itself_is_found(copy: Path) -> None:
    data = (copy / TREE_FILE).read_bytes()
    place = data.index(b"Lima")
    (copy / TREE_FILE).write_bytes(data[:place] + b"\xff\xff\xff\xff" + data[place + 4 :])
    (problem,) = verify_bundle(refinish(copy)).problems
    assert problem.file == TREE_FILE


def test_an_encoder_that_does_not_fit_its_vectors_is_found(copy: Path, other: Path) -> None:
    shutil.copy(other / "encoder" / "model.safetensors", copy / "encoder" / "model.safetensors")
    (problem,) = verify_bundle(refinish(copy)).problems
    assert problem.file == "encoder/config.json"
    assert isinstance(problem.error, BundleEncoderMismatchError)
    assert "fingerprint" in str(problem.error)

    # Even a builder that records the wrong encoder's fingerprint is found out, by the golden image.
    info = read_manifest(other).encoder
    (problem,) = verify_bundle(refinish(copy, encoder=info)).problems
    assert problem.file == "golden/1.png"
    assert isinstance(problem.error, BundleEncoderMismatchError)
    assert "cosine distance" in str(problem.error)


def test_an_encoder_of_another_dimension_is_found(copy: Path) -> None:
    encoder = tiny_encoder(dimension=24)
    encoder.save(copy / "encoder")
    info = read_manifest(copy).encoder
    assert info is not None
    (problem,) = verify_bundle(refinish(copy, encoder=info.model_copy(update={"sha256": encoder.fingerprint}))).problems
    assert isinstance(problem.error, BundleEncoderMismatchError)
    assert "dimension 24, but its indexes were built for 16" in str(problem.error)


def test_an_encoder_that_cannot_be_loaded_is_found(copy: Path) -> None:
    (copy / "encoder" / "config.json").write_text("{}")
    (problem,) = verify_bundle(refinish(copy)).problems
    assert problem.file == "encoder/config.json"


def test_a_golden_image_that_is_none_is_found(copy: Path) -> None:
    (copy / "golden" / "1.png").write_bytes(b"not a picture")
    (problem,) = verify_bundle(refinish(copy)).problems
    assert problem.file == "golden/1.png"


def test_checks_of_opened_parts(whole: Path, other: Path) -> None:
    bundle, foreign = open_bundle(whole), open_bundle(other)
    assert bundle.encoder_path is not None
    assert foreign.encoder_path is not None
    check_encoder(bundle, ImageEncoder.load(bundle.encoder_path))
    with pytest.raises(BundleEncoderMismatchError):
        check_encoder(bundle, ImageEncoder.load(foreign.encoder_path))
    with CellTree.open(bundle.tree_path) as tree, HierarchicalIndex.open(bundle.level_paths) as index:
        check_index(bundle, tree, index)
        with pytest.raises(BundleInconsistentError):
            check_index(foreign, tree, index)


def test_verify_uses_the_loader_it_is_given(whole: Path) -> None:
    loaded: list[Path] = []

    def load(path: Path) -> ImageEncoder:
        loaded.append(path)
        return ImageEncoder.load(path)

    assert verify_bundle(whole, encoder_loader=load).ok
    assert loaded == [whole / "encoder"]


def test_golden_queries_are_those_on_which_beam_and_scan_agree(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny", level_counts=(30, 60, 200), dimension=4)
    bundle = open_bundle(path)
    embeddings = np.random.default_rng(4).standard_normal((40, 4)).astype(np.float32)
    with CellTree.open(bundle.tree_path) as tree, HierarchicalIndex.open(bundle.level_paths) as index:
        narrow = record_golden_queries(tree, index, embeddings, width=2, k=5)
        full = record_golden_queries(tree, index, embeddings, width=60, k=5)
        assert len(full) == 40
        assert 0 < len(narrow) < 40
        for query in narrow:
            hits = index.search(decode_embedding(query.embedding)[None], width=2, k=5)
            assert tuple(tree.tokens(3, hits.ordinals[0])) == query.leaves


def test_golden_scores_are_the_textbook_product(whole: Path) -> None:
    manifest = read_manifest(whole)
    levels, _ = make_levels((4, 9, 20))
    parents = [level.parents for level in levels]
    embeddings = [g.astype(np.float64) for g in geographic_embeddings(parents, 16)]
    for query in manifest.golden_queries:
        image = decode_embedding(query.embedding).astype(np.float64)
        logits = [g @ image / tau for g, tau in zip(embeddings, manifest.temperatures, strict=True)]
        log_scores = logits[2] + logits[1][parents[2]] + logits[0][parents[1]][parents[2]]
        best = np.argsort(-log_scores)[: len(query.leaves)]
        assert [levels[2].tokens[row] for row in best] == list(query.leaves)
        np.testing.assert_allclose(query.scores, log_scores[best], rtol=1e-5)
    assert manifest.default_beam_width == BEAM_WIDTH


def test_reading_a_manifest_loads_neither_faiss_nor_torch_nor_pillow(whole: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import geosurge.store; from geosurge.bundle import open_bundle;"
        "open_bundle(Path(sys.argv[1]));"
        "print([name for name in ('faiss', 'torch', 'PIL', 'transformers', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(whole)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
