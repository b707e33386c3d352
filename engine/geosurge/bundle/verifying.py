"""Checks of a bundle that read all of it, and those that a server repeats with what it has opened."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geosurge.bundle.files import Problem, file_problems, hash_problems, unlisted_problems
from geosurge.bundle.golden import Encoder, golden_image_problems, golden_query_problems
from geosurge.bundle.manifest import ENCODER_DIRECTORY, GOLDEN_DIRECTORY, MANIFEST_FILE, TREE_FILE
from geosurge.bundle.opening import Bundle, read_manifest
from geosurge.cells import CellTree, check_cell_tree, verify_cell_file
from geosurge.errors import (
    BundleCorruptError,
    BundleEncoderMismatchError,
    BundleError,
    BundleInconsistentError,
    EncoderError,
)

if TYPE_CHECKING:
    from geosurge.search import HierarchicalIndex


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_bundle` found."""

    path: Path
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_bundle(path: Path, *, encoder_loader: Callable[[Path], Encoder] | None = None) -> VerifyReport:
    """Checks all that can be checked of a bundle.

    Every byte against its hash, the tree against itself, the indexes against the tree, the encoder against the indexes,
    and the golden queries and images against their recorded answers. Parts whose files are damaged are not opened.

    Args:
        path: Directory of the bundle.
        encoder_loader: Loads the encoder of a directory; ``ImageEncoder.load`` by default.

    Returns:
        The problems found, each with the file that has it.
    """
    try:
        manifest = read_manifest(path)
    except BundleError as error:
        return VerifyReport(path, (Problem(MANIFEST_FILE, error),))
    bundle = Bundle(path, manifest)
    problems = list(file_problems(path, manifest))
    problems += hash_problems(path, manifest, skip={problem.file for problem in problems})
    problems += unlisted_problems(path, manifest)
    problems += _unproven_problems(bundle)
    broken = {problem.file for problem in problems}
    with contextlib.ExitStack() as stack:
        tree = None
        if TREE_FILE not in broken:
            tree_problems, tree = _open_checked_tree(bundle, stack)
            problems += tree_problems
            if tree is not None and not broken.intersection(level.file for level in manifest.levels):
                problems += _open_and_check_index(bundle, tree, stack)
        problems += _gallery_problems(bundle, tree, broken)
        if not any(file.startswith((f"{ENCODER_DIRECTORY}/", f"{GOLDEN_DIRECTORY}/")) for file in broken):
            problems += _load_and_check_encoder(bundle, encoder_loader)
    return VerifyReport(path, tuple(problems))


def check_listed_files(bundle: Bundle) -> None:
    """Compares every byte of a bundle's files with the manifest.

    Raises:
        BundleCorruptError: A file has another content, or cannot be read.
    """
    for problem in hash_problems(bundle.path, bundle.manifest):
        raise problem.error


def check_index(bundle: Bundle, tree: CellTree, index: HierarchicalIndex) -> None:
    """Checks that manifest, tree and indexes belong together and that the golden queries get their answers.

    The leaves that the index decoded for it are let go of.

    Raises:
        BundleInconsistentError: They contradict each other; names the file.
    """
    try:
        for problem in _index_problems(bundle, tree, index):
            raise problem.error
    finally:
        index.release_leaves()


def check_encoder(bundle: Bundle, encoder: Encoder) -> None:
    """Checks that an encoder is the one whose embeddings the bundle's indexes answer.

    Raises:
        BundleEncoderMismatchError: It is another one, or makes other embeddings of the golden images.
        BundleCorruptError: A golden image cannot be read.
    """
    check_encoder_identity(bundle, encoder)
    check_golden_images(bundle, encoder)


def check_encoder_identity(bundle: Bundle, encoder: Encoder) -> None:
    """Checks that an encoder has the weights and the preprocessing that the bundle records.

    Raises:
        BundleEncoderMismatchError: It is another one.
    """
    for problem in _identity_problems(bundle, encoder):
        raise problem.error


def check_golden_images(bundle: Bundle, encoder: Encoder) -> None:
    """Checks that an encoder makes the recorded embeddings of the bundle's golden images.

    Raises:
        BundleEncoderMismatchError: It makes others.
        BundleCorruptError: An image cannot be read.
    """
    for image in bundle.manifest.golden_images:
        for problem in golden_image_problems(bundle, encoder, image):
            raise problem.error


def _unproven_problems(bundle: Bundle) -> Iterator[Problem]:
    """Parts without a recorded answer, of which nothing could tell whether they still are what was built."""
    manifest = bundle.manifest
    missing = []
    if not manifest.golden_queries:
        missing.append("golden queries, which prove its indexes")
    if manifest.encoder is not None and not manifest.golden_images:
        missing.append("golden images, which prove its encoder")
    for what in missing:
        yield Problem(
            MANIFEST_FILE, BundleInconsistentError(f"{bundle.path / MANIFEST_FILE} has no {what}; build it again")
        )


def _open_checked_tree(bundle: Bundle, stack: contextlib.ExitStack) -> tuple[list[Problem], CellTree | None]:
    problems = verify_cell_file(bundle.tree_path)
    if problems:
        error = BundleCorruptError(f"{bundle.path / TREE_FILE}: {problems[0]} ({len(problems)} problems in its pages)")
        return [Problem(TREE_FILE, error)], None
    try:
        tree = stack.enter_context(CellTree.open(bundle.tree_path))
        check_cell_tree(tree)
    except BundleError as error:
        return [Problem(TREE_FILE, error)], None
    return [], tree


def _open_and_check_index(bundle: Bundle, tree: CellTree, stack: contextlib.ExitStack) -> list[Problem]:
    from geosurge.search import HierarchicalIndex  # noqa: PLC0415 - reading a manifest must not load FAISS

    try:
        index = stack.enter_context(contextlib.closing(HierarchicalIndex.open(bundle.level_paths)))
        index.check()
    except BundleError as error:
        # The error names the file at fault first; one that names none concerns them all.
        positions = {level.file: str(error).find(str(bundle.path / level.file)) for level in bundle.manifest.levels}
        named = sorted((position, file) for file, position in positions.items() if position >= 0)
        return [Problem(named[0][1] if named else bundle.manifest.levels[0].file, error)]
    return list(_index_problems(bundle, tree, index))


def _gallery_problems(bundle: Bundle, tree: CellTree | None, broken: Collection[str]) -> Iterator[Problem]:
    info = bundle.manifest.gallery
    if info is None or info.file in broken or info.coordinates_file in broken:
        return
    from geosurge.gallery import Gallery  # noqa: PLC0415 - reading a manifest must not load FAISS

    try:
        with contextlib.closing(Gallery.open(bundle)) as gallery:
            if tree is not None:
                gallery.check(tree)
    except BundleError as error:
        names_coordinates = info.coordinates_file in str(error)
        yield Problem(info.coordinates_file if names_coordinates else info.file, error)


def _load_and_check_encoder(bundle: Bundle, encoder_loader: Callable[[Path], Encoder] | None) -> list[Problem]:
    if bundle.encoder_path is None:
        return []
    if encoder_loader is None:
        from geosurge.encoder.model import ImageEncoder  # noqa: PLC0415 - reading a manifest must not load torch

        encoder_loader = ImageEncoder.load
    try:
        encoder = encoder_loader(bundle.encoder_path)
    except EncoderError as error:
        return [Problem(f"{ENCODER_DIRECTORY}/config.json", BundleEncoderMismatchError(str(error)))]
    problems = list(_identity_problems(bundle, encoder))
    if not problems:
        for image in bundle.manifest.golden_images:
            problems += golden_image_problems(bundle, encoder, image)
    return problems


def _index_problems(bundle: Bundle, tree: CellTree, index: HierarchicalIndex) -> Iterator[Problem]:
    """The first thing in which manifest, tree and indexes differ; only when they agree, the golden queries."""
    found = next(_structure_problems(bundle, tree, index), None)
    if found is not None:
        yield found
        return
    yield from golden_query_problems(bundle, tree, index)


def _structure_problems(bundle: Bundle, tree: CellTree, index: HierarchicalIndex) -> Iterator[Problem]:
    levels, files = bundle.manifest.levels, bundle.level_paths
    if tree.cell_kind != bundle.manifest.cell_kind:
        actual = "named places for cells" if tree.grid is None else f"{tree.grid.name} cells"
        yield Problem(
            TREE_FILE,
            BundleInconsistentError(
                f"{bundle.tree_path} has {actual}, but the manifest says cell_kind {bundle.manifest.cell_kind!r}"
            ),
        )
    counts = tuple(level.cells for level in levels)
    if tree.cell_counts != counts:
        yield Problem(
            TREE_FILE,
            BundleInconsistentError(
                f"{bundle.tree_path} has {tree.cell_counts} cells on its levels, but the manifest says {counts}"
            ),
        )
    if index.dimension != bundle.manifest.dimension:
        yield Problem(
            levels[0].file,
            BundleInconsistentError(
                f"{files[0]} has vectors of {index.dimension} values, but the manifest says {bundle.manifest.dimension}"
            ),
        )
    for level, file, vectors in zip(levels, files, index.cell_counts, strict=True):
        if vectors != level.cells:
            yield Problem(
                level.file,
                BundleInconsistentError(
                    f"{file} has {vectors} vectors, but level {level.level} has {level.cells} cells"
                ),
            )
    for above, level, file in zip(levels, levels[1:], files[1:], strict=False):
        children = np.bincount(tree.parents(level.level), minlength=above.cells)
        differing = np.flatnonzero(index.child_counts(above.level) != children)
        if differing.size:
            yield Problem(
                level.file,
                BundleInconsistentError(
                    f"{file} has other children of cell {differing[0]} of level {above.level} than the cell tree"
                ),
            )


def _identity_problems(bundle: Bundle, encoder: Encoder) -> Iterator[Problem]:
    info = bundle.manifest.encoder
    if info is None:
        return
    file = f"{ENCODER_DIRECTORY}/config.json"
    expected = (
        ("fingerprint", encoder.fingerprint, info.sha256),
        ("preprocessing", encoder.preprocessing.id, info.preprocessing_id),
        ("dimension", encoder.dimension, bundle.manifest.dimension),
    )
    for name, actual, recorded in expected:
        if actual != recorded:
            yield Problem(
                file,
                BundleEncoderMismatchError(
                    f"{bundle.path}: its encoder has the {name} {actual}, but its indexes were built for {recorded}; "
                    "build the bundle again with one encoder"
                ),
            )
            return
