from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from support.hierarchies import DIMENSION, inverted_file, small_tree

from geosurge.errors import BundleCorruptError, BundleInconsistentError, BundlePartialError, GeoSurgeError
from geosurge.search import HierarchicalIndex
from geosurge_training.building.indexing import write_level_indexes


@pytest.mark.parametrize("storage", ["fp32", "sq8"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_file_cut_anywhere_is_corrupt(directory: Path, storage: str, level: int) -> None:
    paths = write_level_indexes(directory, *small_tree(), storage)
    whole = paths[level - 1].read_bytes()
    HierarchicalIndex.open(paths).close()
    for length in range(len(whole)):
        paths[level - 1].write_bytes(whole[:length])
        with pytest.raises(BundleCorruptError, match=f"level-{level}.faiss"):
            HierarchicalIndex.open(paths)


def test_a_longer_file_text_and_a_missing_file_are_refused(directory: Path) -> None:
    paths = write_level_indexes(directory, *small_tree())
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole + b"\0")
    with pytest.raises(
        BundleCorruptError, match=f"level-2.faiss: has {len(whole) + 1} bytes .* announces {len(whole)}"
    ):
        HierarchicalIndex.open(paths)
    paths[1].write_text("this is not an index")
    with pytest.raises(BundleCorruptError, match=r"level-2.faiss: truncated or not a FAISS index \(.+\)"):
        HierarchicalIndex.open(paths)
    paths[1].unlink()
    with pytest.raises(BundlePartialError, match=r"level-2\.faiss"):
        HierarchicalIndex.open(paths)
    with pytest.raises(BundleInconsistentError, match="no index files"):
        HierarchicalIndex.open([])


FOUR = np.ones((4, DIMENSION), np.float32)


FAMILIES = np.array([0, 1, 2, 2])


QUANTIZED_LEVEL = faiss.IndexScalarQuantizer(DIMENSION, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


L2_LEVEL = faiss.IndexFlatL2(DIMENSION)


L2_LEVEL.add(FOUR[:2])


@pytest.mark.parametrize(
    ("level", "index", "message"),
    [
        (3, inverted_file(FOUR, FAMILIES, 5), "level-3.faiss: has 5 lists where .*level-2.faiss has 3 cells"),
        (3, inverted_file(FOUR[:, :4].copy(), FAMILIES, 3), "level-3.faiss: has 4 dimensions where .* has 8"),
        (3, inverted_file(FOUR, FAMILIES, 3, metric=faiss.METRIC_L2), "level-3.faiss: has FAISS metric 1"),
        (3, inverted_file(FOUR, FAMILIES, 3, by_residual=True), "level-3.faiss: stores residuals"),
        (3, inverted_file(FOUR[:0], FAMILIES[:0], 3), "level-3.faiss: holds no cells"),
        (3, faiss.IndexFlatIP(DIMENSION), "level-3.faiss: is a IndexFlatIP; level 3 must be IndexIVFFlat or"),
        (1, QUANTIZED_LEVEL, "level-1.faiss: is a IndexScalarQuantizer; level 1 must be IndexFlat"),
        (1, L2_LEVEL, "level-1.faiss: has FAISS metric 1"),
        (1, faiss.IndexFlatIP(DIMENSION), "level-1.faiss: holds no cells"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    directory: Path, level: int, index: faiss.Index, message: str
) -> None:
    paths = write_level_indexes(directory, *small_tree())
    faiss.write_index(index, str(paths[level - 1]))
    with pytest.raises(BundleInconsistentError, match=message):
        HierarchicalIndex.open(paths)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 2, 9], r"level-3.faiss: list 2 holds the ids \[2, 9\] where the ordinals 2 to 3 belong"),
        ([1, 0, 2, 3], r"level-3.faiss: list 0 holds the ids \[1\]"),
        ([0, 1, 3, 2], r"level-3.faiss: list 2 holds the ids \[3, 2\]"),
        ([0, 1, 2, 2], "level-3.faiss: list 2"),
    ],
)
def test_check_finds_ids_that_are_not_the_ordinals(directory: Path, ids: list[int], message: str) -> None:
    paths = write_level_indexes(directory, *small_tree())
    faiss.write_index(inverted_file(FOUR, FAMILIES, 3, ids=np.array(ids)), str(paths[2]))
    with HierarchicalIndex.open(paths) as index, pytest.raises(BundleInconsistentError, match=message):
        index.check()


@pytest.fixture
def bounded_allocations() -> Iterator[None]:
    """A flipped length must not make FAISS allocate what it announces."""
    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(1 << 20)
    faiss.set_deserialization_loop_limit(1 << 20)
    yield
    faiss.set_deserialization_vector_byte_limit(before[0])
    faiss.set_deserialization_loop_limit(before[1])


@pytest.mark.usefixtures("bounded_allocations")
def test_a_flipped_header_byte_is_refused_or_harmless(directory: Path) -> None:
    paths = write_level_indexes(directory, *small_tree())
    embeddings = np.ones((3, DIMENSION), np.float32)
    whole = paths[2].read_bytes()
    header_size = len(whole) - 4 * (4 * DIMENSION + 8)
    refusals = []
    for position in range(header_size):
        paths[2].write_bytes(whole[:position] + bytes([whole[position] ^ 0x81]) + whole[position + 1 :])
        try:
            with HierarchicalIndex.open(paths) as index:
                index.search(embeddings, width=4, k=4)
        except GeoSurgeError as error:
            refusals.append(str(error))
    assert len(refusals) > header_size / 2
    assert all("level-3.faiss" in message for message in refusals)
