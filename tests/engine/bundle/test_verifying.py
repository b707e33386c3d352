from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import BUNDLE_FILES, make_bundle, tiny_encoder

from geosurge.bundle import finish_bundle, open_bundle, read_manifest
from geosurge.bundle.manifest import (
    TREE_FILE,
)
from geosurge.bundle.verifying import check_encoder, check_index, check_listed_files, verify_bundle
from geosurge.cells import CellTree
from geosurge.encoder import ImageEncoder
from geosurge.errors import (
    BundleCorruptError,
    BundleEncoderMismatchError,
    BundleInconsistentError,
)
from geosurge.search import HierarchicalIndex


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
    assert sorted(bundle.manifest.files) == BUNDLE_FILES
    assert bundle.manifest.golden_queries
    assert bundle.manifest.golden_images
    report = verify_bundle(whole)
    assert report.ok, report.problems


def test_a_bundle_without_encoder_verifies(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny")
    assert open_bundle(path).encoder_path is None
    assert verify_bundle(path).ok


@pytest.mark.parametrize("file", BUNDLE_FILES)
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


def test_all_damaged_files_are_named(copy: Path) -> None:
    (copy / "golden/1.png").unlink()
    (copy / "level-2.faiss").write_bytes(b"")
    with (copy / TREE_FILE).open("r+b") as file:
        file.write(b"x")
    assert {problem.file for problem in verify_bundle(copy).problems} == {"golden/1.png", "level-2.faiss", TREE_FILE}


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
