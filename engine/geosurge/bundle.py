"""Index bundles: immutable directories that hold everything one index version answers with.

| file | what it is |
|---|---|
| ``manifest.json`` | the `Manifest`; written last, so that a directory with one is whole |
| ``level-<l>.faiss`` | composites of each level |
| ``cells.lmdb/data.mdb`` | the tree of cells |
| ``encoder/`` | configuration and weights, unless the index answers embeddings only |
| ``golden/`` | pictures whose embeddings the manifest records |

`open_bundle` is cheap and finds what is missing, cut short or of another schema. `verify_bundle` reads every byte and
asks the golden queries. A bundle is data only: nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from geosurge.cells import CellTree, verify_cell_file
from geosurge.errors import (
    BundleCorruptError,
    BundleEncoderMismatchError,
    BundleError,
    BundleInconsistentError,
    BundleNotFoundError,
    BundlePartialError,
    EncoderError,
    ImageError,
)
from geosurge.manifest import (
    ENCODER_DIRECTORY,
    GOLDEN_DIRECTORY,
    MANIFEST_FILE,
    READABLE_SCHEMA_VERSIONS,
    SCHEMA_VERSION,
    TREE_FILE,
    CalibrationInfo,
    Domain,
    EncoderInfo,
    FileInfo,
    GoldenImage,
    GoldenQuery,
    LevelInfo,
    Manifest,
    decode_embedding,
    encode_embedding,
    installed_library_versions,
    parse_manifest,
    render_manifest,
)

if TYPE_CHECKING:
    from geosurge.preprocessing import Preprocessing
    from geosurge.search import HierarchicalIndex

__all__ = [
    "ENCODER_DIRECTORY",
    "GOLDEN_DIRECTORY",
    "MANIFEST_FILE",
    "READABLE_SCHEMA_VERSIONS",
    "SCHEMA_VERSION",
    "TREE_FILE",
    "Bundle",
    "CalibrationInfo",
    "Domain",
    "EncoderInfo",
    "FileInfo",
    "GoldenImage",
    "GoldenQuery",
    "LevelInfo",
    "Manifest",
    "Problem",
    "VerifyReport",
    "check_encoder",
    "check_encoder_identity",
    "check_golden_images",
    "check_index",
    "check_listed_files",
    "decode_embedding",
    "encode_embedding",
    "finish_bundle",
    "fsync_directory",
    "fsync_file",
    "installed_library_versions",
    "open_bundle",
    "read_manifest",
    "record_golden_queries",
    "replace_file",
    "verify_bundle",
]

GOLDEN_COSINE_TOLERANCE = 1e-3
"""Cosine distance allowed between a golden image's embedding and the recorded one."""

# A score sums seven similarities of up to 1 / 0.07 in float32; machines differ in the order of the additions.
_SCORE_RELATIVE_TOLERANCE = 1e-4
_SCORE_ABSOLUTE_TOLERANCE = 1e-3

_READ_BYTES = 1 << 20


class Encoder(Protocol):
    """What verification needs of an encoder; `geosurge.encoder.model.ImageEncoder` is one."""

    @property
    def dimension(self) -> int:
        """Length of the embeddings."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration and weights."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The way from an image to pixels."""

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings of a batch of pixels."""


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened: every file is there and has its size."""

    path: Path
    manifest: Manifest

    @property
    def level_paths(self) -> tuple[Path, ...]:
        """FAISS files, coarsest level first."""
        return tuple(self.path / level.file for level in self.manifest.levels)

    @property
    def tree_path(self) -> Path:
        """Directory of the cell tree."""
        return (self.path / TREE_FILE).parent

    @property
    def encoder_path(self) -> Path | None:
        """Directory of the encoder; ``None`` when the index answers embeddings only."""
        return None if self.manifest.encoder is None else self.path / ENCODER_DIRECTORY


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with one file of a bundle.

    Attributes:
        file: Path inside the bundle.
        error: What using the file would raise.
    """

    file: str
    error: BundleError


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_bundle` found."""

    path: Path
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def finish_bundle(directory: Path, manifest: Manifest) -> Manifest:
    """Turns a directory of finished files into a bundle: records sizes and hashes, and writes the manifest last.

    Everything is on the disk when this returns. A directory that was finished before is finished anew.

    Args:
        directory: Holds all files of the bundle but the manifest.
        manifest: Its `files` and `manifest_sha256` are ignored.

    Returns:
        The manifest as written.

    Raises:
        BundleInconsistentError: The directory holds a link, or misses a file that the manifest speaks of.
    """
    with contextlib.suppress(FileNotFoundError):
        (directory / MANIFEST_FILE).unlink()
    files: dict[str, FileInfo] = {}
    for relative in _walk(directory):
        if not _is_plain(directory, relative):
            raise BundleInconsistentError(f"{directory / relative} is a link or no regular file; copy the data instead")
        files[relative] = FileInfo(size=(directory / relative).stat().st_size, sha256=_sha256(directory / relative))
        fsync_file(directory / relative)
    # Built anew rather than copied, so that every field is validated.
    whole = Manifest.model_validate(dict(manifest) | {"files": files})
    missing = [file for file in whole.needed_files if file not in files]
    if missing:
        raise BundleInconsistentError(f"{directory} has no {missing[0]}, which the manifest speaks of")
    for folder, _, _ in os.walk(directory, topdown=False):
        fsync_directory(Path(folder))
    sealed, data = render_manifest(whole)
    replace_file(directory / MANIFEST_FILE, data)
    return sealed


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of the bundle in the directory ``path``.

    Raises:
        BundleNotFoundError: There is no such directory.
        BundlePartialError: The directory has no manifest.
        BundleSchemaError: The manifest is of another schema.
        BundleCorruptError: It is damaged.
    """
    file = path / MANIFEST_FILE
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        if not path.is_dir():
            raise BundleNotFoundError(f"there is no index bundle at {path}") from error
        raise BundlePartialError(f"{path} has no {MANIFEST_FILE}, so it is no finished index bundle") from error
    except OSError as error:
        raise BundleCorruptError(f"{file} cannot be read: {error}") from error
    return parse_manifest(data, str(file))


def open_bundle(path: Path) -> Bundle:
    """Opens a bundle after checking that every file is there and has its size.

    Raises:
        BundleNotFoundError: There is no such directory.
        BundlePartialError: The manifest or a file is missing.
        BundleSchemaError: The manifest is of another schema.
        BundleCorruptError: The manifest is damaged, or a file has another size.
    """
    manifest = read_manifest(path)
    for problem in _file_problems(path, manifest):
        raise problem.error
    return Bundle(path, manifest)


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
    problems = list(_file_problems(path, manifest))
    problems += _hash_problems(bundle, skip={problem.file for problem in problems})
    problems += _unlisted_problems(bundle)
    problems += _unproven_problems(bundle)
    broken = {problem.file for problem in problems}
    with contextlib.ExitStack() as stack:
        if TREE_FILE not in broken:
            tree_problems, tree = _open_checked_tree(bundle, stack)
            problems += tree_problems
            if tree is not None and not broken.intersection(level.file for level in manifest.levels):
                problems += _open_and_check_index(bundle, tree, stack)
        if not any(file.startswith((f"{ENCODER_DIRECTORY}/", f"{GOLDEN_DIRECTORY}/")) for file in broken):
            problems += _load_and_check_encoder(bundle, encoder_loader)
    return VerifyReport(path, tuple(problems))


def check_listed_files(bundle: Bundle) -> None:
    """Compares every byte of a bundle's files with the manifest.

    Raises:
        BundleCorruptError: A file has another content, or cannot be read.
    """
    for problem in _hash_problems(bundle):
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
        for problem in _golden_image_problems(bundle, encoder, image):
            raise problem.error


def record_golden_queries(
    tree: CellTree, index: HierarchicalIndex, embeddings: NDArray[np.float32], *, width: int, k: int
) -> tuple[GoldenQuery, ...]:
    """Records what an index answers, for its manifest.

    An embedding for which the beam of the given width finds other leaves than the full scan is left out, because both
    must give a golden query's answer.

    Args:
        tree: The tree of the bundle.
        index: Its indexes.
        embeddings: (n, d) float32, unit rows.
        width: The bundle's default beam width.
        k: Leaves to record.
    """
    exact = index.exact(embeddings, k=k)
    beam = index.search(embeddings, width=width, k=k)
    queries = []
    for row, embedding in enumerate(embeddings):
        found = exact.ordinals[row] >= 0
        query = GoldenQuery(
            embedding=encode_embedding(embedding),
            leaves=tuple(tree.tokens(tree.level_count, exact.ordinals[row][found])),
            scores=tuple(exact.scores[row][found].tolist()),
        )
        if _answers(query, tree, beam.ordinals[row], beam.scores[row]):
            queries.append(query)
    return tuple(queries)


def fsync_file(path: Path) -> None:
    """Forces a file's content onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: Path) -> None:
    """Forces the names in a directory onto the disk."""
    fsync_file(path)


def replace_file(path: Path, data: bytes) -> None:
    """Gives a file new content such that, whenever the power fails, it has the old content or the new."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_directory(path.parent)


def _walk(directory: Path) -> list[str]:
    """Relative paths of everything in a bundle's directory that is no directory, less the manifest's own."""
    found = []
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [(Path(folder) / name).relative_to(directory).as_posix() for name in files + links]
    return sorted(set(found) - {MANIFEST_FILE, f".{MANIFEST_FILE}.partial"})


def _is_plain(directory: Path, relative: str) -> bool:
    """Whether a path is a regular file reached without following a link below the directory."""
    path = directory / relative
    return path.is_file() and path.resolve() == directory.resolve() / relative


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _file_problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    """What opening finds: files that are not listed, missing, no plain files, or of another size."""
    for relative in manifest.needed_files:
        if relative not in manifest.files:
            yield Problem(
                relative, BundlePartialError(f"{path / MANIFEST_FILE} does not list {relative}, which it speaks of")
            )
    for relative, info in manifest.files.items():
        file = path / relative
        if not os.path.lexists(file):
            yield Problem(relative, BundlePartialError(f"{file} is missing; publish the bundle again"))
        elif not _is_plain(path, relative):
            yield Problem(
                relative, BundleCorruptError(f"{file} is a link or no regular file; a bundle holds its own data")
            )
        elif (size := file.stat().st_size) != info.size:
            yield Problem(
                relative,
                BundleCorruptError(f"{file} has {size} bytes instead of {info.size}; publish the bundle again"),
            )


def _hash_problems(bundle: Bundle, *, skip: Collection[str] = ()) -> Iterator[Problem]:
    """Files whose content is not what the manifest records."""
    for relative, info in bundle.manifest.files.items():
        if relative in skip:
            continue
        file = bundle.path / relative
        try:
            digest = _sha256(file)
        except OSError as error:
            yield Problem(relative, BundleCorruptError(f"{file} cannot be read: {error}"))
            continue
        if digest != info.sha256:
            yield Problem(
                relative, BundleCorruptError(f"{file} has another SHA-256 than recorded; publish the bundle again")
            )


def _unlisted_problems(bundle: Bundle) -> Iterator[Problem]:
    """Files that nobody vouches for."""
    for relative in sorted(set(_walk(bundle.path)) - set(bundle.manifest.files)):
        yield Problem(relative, BundleInconsistentError(f"{bundle.path / relative} is not in the manifest; remove it"))


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
        tree.check()
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
            problems += _golden_image_problems(bundle, encoder, image)
    return problems


def _index_problems(bundle: Bundle, tree: CellTree, index: HierarchicalIndex) -> Iterator[Problem]:
    """The first thing in which manifest, tree and indexes differ; only when they agree, the golden queries."""
    found = next(_structure_problems(bundle, tree, index), None)
    if found is not None:
        yield found
        return
    yield from _golden_query_problems(bundle, tree, index)


def _structure_problems(bundle: Bundle, tree: CellTree, index: HierarchicalIndex) -> Iterator[Problem]:
    levels, files = bundle.manifest.levels, bundle.level_paths
    if tree.has_s2_cells != (bundle.manifest.cell_kind == "s2"):
        actual = "S2 cells" if tree.has_s2_cells else "cells that are not S2 cells"
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


def _golden_query_problems(bundle: Bundle, tree: CellTree, index: HierarchicalIndex) -> Iterator[Problem]:
    manifest = bundle.manifest
    for number, query in enumerate(manifest.golden_queries):
        embedding = decode_embedding(query.embedding)[None]
        k = max(len(query.leaves), 1)
        answers = {
            "a full scan": index.exact(embedding, k=k),
            f"a beam of {manifest.default_beam_width}": index.search(embedding, width=manifest.default_beam_width, k=k),
        }
        for name, hits in answers.items():
            if not _answers(query, tree, hits.ordinals[0], hits.scores[0]):
                yield Problem(
                    manifest.levels[-1].file,
                    BundleInconsistentError(
                        f"{bundle.path}: {name} answers golden query {number} with other leaves or scores than recorded"
                    ),
                )


def _answers(query: GoldenQuery, tree: CellTree, ordinals: NDArray[np.int64], scores: NDArray[np.float32]) -> bool:
    """Whether a search found the leaves of a golden query, up to the order of leaves that score alike."""
    found = ordinals >= 0
    given = dict(zip(tree.tokens(tree.level_count, ordinals[found]), scores[found].tolist(), strict=True))
    if len(given) != len(query.leaves) or not _alike(sorted(given.values()), sorted(query.scores)):
        return False
    last = min(query.scores, default=0.0)
    return all(
        _alike([given[leaf]], [score]) if leaf in given else _alike([score], [last])
        for leaf, score in zip(query.leaves, query.scores, strict=True)
    )


def _alike(scores: Sequence[float], others: Sequence[float]) -> bool:
    return bool(np.allclose(scores, others, rtol=_SCORE_RELATIVE_TOLERANCE, atol=_SCORE_ABSOLUTE_TOLERANCE))


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


def _golden_image_problems(bundle: Bundle, encoder: Encoder, image: GoldenImage) -> Iterator[Problem]:
    file = bundle.path / image.file
    try:
        pixels = encoder.preprocessing.decode(file.read_bytes())
    except (ImageError, OSError) as error:
        yield Problem(image.file, BundleCorruptError(f"{file} cannot be read as an image: {error}"))
        return
    embedding = encoder.encode(pixels[None])[0].astype(np.float64)
    recorded = decode_embedding(image.embedding).astype(np.float64)
    distance = 1 - embedding @ recorded / (np.linalg.norm(embedding) * np.linalg.norm(recorded))
    if not distance <= GOLDEN_COSINE_TOLERANCE:
        yield Problem(
            image.file,
            BundleEncoderMismatchError(
                f"{bundle.path}: its encoder's embedding of {image.file} is {distance:.3g} away from the recorded one "
                f"(cosine distance; {GOLDEN_COSINE_TOLERANCE:g} is allowed)"
            ),
        )
