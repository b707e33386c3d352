"""The tree of geocells: which cells a level has, what is above and below each, and where it lies.

A tree is one LMDB environment (0.9 format) with three named databases:

| database | key | value |
|---|---|---|
| ``cells`` | level (1 byte), ordinal (big-endian u32) | serialized ``geosurge.v1.Cell`` |
| ``tokens`` | token in UTF-8, ``0x00``, level (1 byte) | ordinal (big-endian u32) |
| ``columns`` | ``levels``, ``<level>/<column>`` | packed little-endian array |

The records hold everything that is known of one cell. The columns repeat what a query needs of all cells at once
(parents, tokens, and the leaves' coordinates), so that opening a tree parses no records.

Cells of a level are numbered such that the children of a cell are one contiguous run: parents never decrease along a
level. All descendants of a cell on any level are then one contiguous run too.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb
import numpy as np
from google.protobuf.message import DecodeError
from lmdb import _Database
from lmdb.verify import VerifyError
from lmdb.verify import verify as verify_lmdb
from numpy.typing import ArrayLike, DTypeLike, NDArray

from geosurge import geodesy
from geosurge.errors import (
    BundleCorruptError,
    BundleInconsistentError,
    BundlePartialError,
    CellKindUnsupportedError,
    CellUnknownError,
    LevelOutOfRangeError,
)
from geosurge.location import Place
from geosurge.v1 import cell_pb2

DATA_FILE = "data.mdb"
"""The one file of a tree, inside its directory."""

MAX_LEVELS = 255
MAX_CACHED_PLACES = 16_384
"""Places that a tree keeps in memory, some 10 MB: queries ask for those of the same leaves again and again."""

MAX_TOKEN_BYTES = 509  # LMDB's 511-byte key less the separator and the level.

_DATABASES = (b"cells", b"tokens", b"columns")
_LEVELS_KEY = b"levels"
_LEAF_COLUMNS = {
    "latitude_deg": np.dtype("<f8"),
    "longitude_deg": np.dtype("<f8"),
    "spread_km": np.dtype("<f8"),
    "area_km2": np.dtype("<f8"),
    "sample_counts": np.dtype("<i8"),
}


@dataclass(frozen=True)
class CellRows:
    """The cells of one level as columns, in ordinal order.

    Attributes:
        tokens: Ids of the n cells, unique within the level.
        parents: (n,) ordinals of the parents on the level above, never decreasing; -1 on level 1.
        mean_latitude_deg: (n,) latitude of the cells' answer.
        mean_longitude_deg: (n,) longitude of the cells' answer.
        spread_km: (n,) root-mean-square great-circle distance of the samples to the mean.
        area_km2: (n,) areas.
        sample_counts: (n,) training coordinates in each cell.
        outlines: n arrays (k, 2) of [latitude, longitude] corners in degrees, counter-clockwise.
        s2_levels: (n,) subdivision levels; ``None`` when the cells are not S2 cells.
        places: The place nearest to each mean; empty when none is known for any.
    """

    tokens: Sequence[str]
    parents: NDArray[np.int64]
    mean_latitude_deg: NDArray[np.float64]
    mean_longitude_deg: NDArray[np.float64]
    spread_km: NDArray[np.float64]
    area_km2: NDArray[np.float64]
    sample_counts: NDArray[np.int64]
    outlines: Sequence[NDArray[np.float64]]
    s2_levels: NDArray[np.int64] | None = None
    places: Sequence[Place | None] = field(default=())


@dataclass(frozen=True)
class LeafColumns:
    """What a query needs of all leaves at once; read-only arrays of shape (n,) in ordinal order."""

    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    spread_km: NDArray[np.float64]
    area_km2: NDArray[np.float64]
    sample_counts: NDArray[np.int64]


def write_cell_tree(path: Path, levels: Sequence[CellRows], *, store_outlines: bool = True) -> None:
    """Writes a tree into the directory ``path``, which must not exist or be empty.

    Args:
        path: Directory to make, ``cells.lmdb`` by convention.
        levels: Cells of each level, coarsest first.
        store_outlines: Keep the outlines of S2 cells in the records. Without them the file is a third smaller, and
            readers compute them from the tokens.

    Raises:
        ValueError: The rows do not form a tree, or are S2 cells that overlap, do not ascend along the Hilbert curve or
            leave their parents; names the level and the first bad row.
        FileExistsError: The directory holds something.
    """
    _validate_rows(levels)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty; write the tree to a new directory")
    # A compacting copy is what makes the file as small as its data, so the pages are first written beside it.
    scratch = Path(tempfile.mkdtemp(prefix=".cells-", dir=path.parent))
    try:
        with lmdb.open(
            str(scratch), map_size=_map_size(levels), max_dbs=3, lib_version=0, lock=False, sync=False
        ) as environment:
            databases = [environment.open_db(name) for name in _DATABASES]
            with environment.begin(write=True) as transaction:
                _write_records(transaction, databases[0], levels, store_outlines=store_outlines)
                _write_tokens(transaction, databases[1], levels)
                _write_columns(transaction, databases[2], levels)
            environment.copy(str(path), compact=True)
    finally:
        shutil.rmtree(scratch)


def verify_cell_file(path: Path) -> list[str]:
    """Walks the pages of a tree's file without handing them to LMDB.

    LMDB trusts its file and may crash the process on a damaged one: call this before `CellTree.open` on a file that
    nothing vouches for.

    Returns:
        Problems found; empty for a sound file.
    """
    try:
        return list(verify_lmdb(str(path / DATA_FILE), subdir=False))  # type: ignore[no-untyped-call]
    except (VerifyError, OSError) as error:
        return [str(error)]


class CellTree:
    """A read-only tree of cells; safe to use from many threads at once."""

    def __init__(self, environment: _Environment, counts: tuple[int, ...], columns: dict[str, NDArray[Any]]) -> None:
        self._environment = environment
        self._columns = columns
        self._closed = False
        self.cell_counts = counts
        """Cells on each level, coarsest first."""
        self.level_count = len(counts)
        """Number of levels, L."""
        self.leaves = LeafColumns(**{name: columns[f"{len(counts)}/{name}"] for name in _LEAF_COLUMNS})
        """Coordinates, spreads, areas and sample counts of the leaves."""
        # Row i of level l has the children starts[i] to starts[i + 1] - 1 on level l + 1.
        self._child_starts = [
            np.searchsorted(self.parents(level + 1), np.arange(counts[level - 1] + 1)).astype(np.int64)
            for level in range(1, len(counts))
        ]
        # The same for the leaves under row i of each level.
        self._leaf_starts = [np.arange(counts[-1] + 1)]
        for starts in reversed(self._child_starts):
            self._leaf_starts.insert(0, self._leaf_starts[0][starts])
        self._tokens = _join_tokens(columns, len(counts))
        self._places: dict[tuple[int, int], Place | None] = {}

    @classmethod
    def open(cls, path: Path) -> CellTree:
        """Opens the tree in the directory ``path``.

        A process shares one LMDB environment between all trees opened on the same file, and so does a process that is
        forked while a tree is open.

        Raises:
            BundlePartialError: There is no tree.
            BundleCorruptError: The file is damaged or misses a part.
        """
        data = path / DATA_FILE
        if not data.is_file():
            raise BundlePartialError(f"the cell tree {data} is missing; publish the bundle again")
        environment = _acquire(data)
        try:
            with _corruption_of(data):
                counts = _read_counts(environment)
                columns = _read_columns(environment, counts)
            return cls(environment, counts, columns)
        except BaseException:
            _release(environment)
            raise

    def close(self) -> None:
        """Gives the environment back; calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._places = {}
            _release(self._environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cell(self, level: int, ordinal: int) -> cell_pb2.Cell:
        """Reads one cell.

        Raises:
            LevelOutOfRangeError: The tree has no such level.
            CellUnknownError: The level has no such row.
        """
        self._check_ordinal(level, ordinal)
        with self._reading() as transaction:
            return _with_outline(self._read_record(transaction, level, ordinal))

    def find(self, token: str, level: int | None = None, *, finest: bool = False) -> cell_pb2.Cell:
        """Finds a cell by its token.

        A cell that was not split stands on several levels under the same token.

        Args:
            token: Id of the cell.
            level: Level to look on; ``None`` looks on all.
            finest: Without a level, return the cell of the finest level with this token instead of the coarsest.

        Raises:
            CellUnknownError: No cell has this token.
            LevelOutOfRangeError: The tree has no such level.
        """
        if level is not None:
            self._check_level(level)
        with self._reading() as transaction:
            found = self._look_up(transaction, token, level)
            if found:
                return _with_outline(self._read_record(transaction, *found[-1 if finest else 0]))
        where = "" if level is None else f" on level {level}"
        raise CellUnknownError(f"no cell has the token {token!r}{where}; tokens of level 1 can be listed as children")

    def children(self, level: int, ordinal: int) -> range:
        """Ordinals, on the next level, of a cell's children; empty for a leaf."""
        self._check_ordinal(level, ordinal)
        if level == self.level_count:
            return range(0)
        starts = self._child_starts[level - 1]
        return range(int(starts[ordinal]), int(starts[ordinal + 1]))

    def path(self, latitude_deg: float, longitude_deg: float) -> list[cell_pb2.Cell]:
        """Cells that hold a coordinate, from level 1 down.

        The path ends where the coordinate leaves the partition, and is empty when no cell of level 1 holds it.

        Raises:
            CellKindUnsupportedError: The tree's cells are not S2 cells.
            CoordinateOutOfRangeError: The coordinate is not on the globe.
        """
        geodesy.validate_coordinates(latitude_deg, longitude_deg)
        if not self.has_s2_cells:
            raise CellKindUnsupportedError(
                "the cells that hold a coordinate are known for S2 cells only, and this tree has cells of another "
                "kind; look cells up by their tokens"
            )
        point = np.atleast_1d(geodesy.latlng_to_cell_id(latitude_deg, longitude_deg))
        cells: list[cell_pb2.Cell] = []
        above = 0
        with self._reading() as transaction:
            for level in range(1, self.level_count + 1):
                coarsest, finest = (int(value) for value in self._columns[f"{level}/s2_level_range"])
                for s2_level in range(max(above, coarsest), finest + 1):
                    token = geodesy.cell_id_to_token(geodesy.cell_id_to_parent(point, s2_level))[0]
                    found = self._look_up(transaction, token, level)
                    if found:
                        cells.append(_with_outline(self._read_record(transaction, *found[0])))
                        above = s2_level
                        break
                else:
                    return cells
        return cells

    def ancestors(self, leaf_ordinals: ArrayLike) -> NDArray[np.int64]:
        """Ordinals of leaves and all cells above them.

        Args:
            leaf_ordinals: (m,) ordinals of leaves; -1 pads.

        Returns:
            (m, L) ordinals, level 1 in the first column and the leaf in the last; padding gives rows of -1.
        """
        ordinals = np.asarray(leaf_ordinals, dtype=np.int64)
        result = np.empty((*ordinals.shape, self.level_count), dtype=np.int64)
        result[..., -1] = ordinals
        for level in range(self.level_count, 1, -1):
            result[..., level - 2] = self.parents(level)[result[..., level - 1]]
        result[ordinals < 0] = -1
        return result

    def leaf_range(self, level: int, ordinal: int) -> tuple[int, int]:
        """Half-open range of the ordinals of the leaves under a cell; a leaf is under itself."""
        self._check_ordinal(level, ordinal)
        starts = self._leaf_starts[level - 1]
        return int(starts[ordinal]), int(starts[ordinal + 1])

    def leaf_ranges(self, paths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Half-open ranges of the ordinals of the leaves under whole paths, as `ancestors` returns them.

        Args:
            paths: (m, L) ordinals without padding, level 1 in the first column.

        Returns:
            (m, L, 2) first leaf and the one after the last.
        """
        ranges = np.empty((*paths.shape, 2), dtype=np.int64)
        for column, starts in enumerate(self._leaf_starts):
            ranges[:, column, 0] = starts[paths[:, column]]
            ranges[:, column, 1] = starts[paths[:, column] + 1]
        return ranges

    def tokens(self, level: int, ordinals: ArrayLike) -> list[str]:
        """Tokens of cells of one level.

        Args:
            level: 1 to L.
            ordinals: (m,) rows of that level.
        """
        self._check_level(level)
        rows = np.asarray(ordinals, dtype=np.int64)
        count = self.cell_counts[level - 1]
        # One pass for both ends: a negative number is a large one without its sign.
        if rows.size and int(rows.view(np.uint64).max()) >= count:
            raise CellUnknownError(f"level {level} has the ordinals 0 to {count - 1}, not {rows.min()} to {rows.max()}")
        return self._tokens.of(rows + self._tokens.level_starts[level - 1])

    def path_tokens(self, paths: NDArray[np.int64]) -> list[list[str]]:
        """Tokens of whole paths, as `ancestors` returns them.

        Args:
            paths: (m, L) ordinals without padding, level 1 in the first column.
        """
        tokens = iter(self._tokens.of((paths + self._tokens.level_starts).ravel()))
        return [list(itertools.islice(tokens, self.level_count)) for _ in paths]

    def parents(self, level: int) -> NDArray[np.int64]:
        """(n,) ordinals of the parents of a level's cells; -1 on level 1."""
        self._check_level(level)
        parents: NDArray[np.int64] = self._columns[f"{level}/parents"]
        return parents

    def cell_ids(self, level: int) -> NDArray[np.uint64]:
        """(n,) S2 ids of a level's cells.

        Raises:
            CellKindUnsupportedError: The tree's cells are not S2 cells.
            LevelOutOfRangeError: The tree has no such level.
            BundleCorruptError: A token is no S2 cell.
        """
        if not self.has_s2_cells:
            raise CellKindUnsupportedError("only S2 cells have S2 ids, and this tree has cells of another kind")
        try:
            return geodesy.token_to_cell_id(self.tokens(level, np.arange(self.cell_counts[level - 1])))
        except ValueError as error:
            raise BundleCorruptError(f"{self._environment.file}: level {level}: {error}") from error

    def places(self, level: int, ordinals: Sequence[int]) -> list[Place | None]:
        """The named places nearest to cells' means, ``None`` where none is known.

        Raises:
            LevelOutOfRangeError: The tree has no such level.
            CellUnknownError: The level has no such row.
        """
        wanted = [(level, ordinal) for ordinal in ordinals]
        known = self._places
        missing = {key for key in wanted if key not in known}
        if missing or self._closed:
            with self._reading() as transaction:
                read = {key: self._read_place(transaction, *key) for key in missing}
            if len(known) + len(read) > MAX_CACHED_PLACES:
                # Other threads may be reading the old dictionary: they keep it, and this call its own part of it.
                known = self._places = {key: known[key] for key in wanted if key in known}
            known.update(read)
        return [known[key] for key in wanted]

    @property
    def has_s2_cells(self) -> bool:
        """Whether the tokens are S2 tokens, so that `path` can answer."""
        return "1/s2_level_range" in self._columns

    def check(self) -> None:
        """Reads every record and compares it with the columns, the token look-up and its neighbours in the tree.

        Takes seconds for a million cells.

        Raises:
            BundleCorruptError: The file's pages are damaged, or a record cannot be read.
            BundleInconsistentError: Two parts of the tree contradict each other; names the cell.
        """
        file = self._environment.file
        problems = verify_cell_file(file.parent)
        if problems:
            raise BundleCorruptError(f"{file}: {problems[0]} ({len(problems)} problems in its pages)")
        with self._reading() as transaction:
            environment = self._environment
            for name, database in (("cells", environment.cells), ("tokens", environment.tokens)):
                entries = transaction.stat(database)["entries"]
                if entries != sum(self.cell_counts):
                    raise BundleInconsistentError(
                        f"{file}: {entries} entries in {name!r}, but the levels have {sum(self.cell_counts)} cells"
                    )
            for level in range(1, self.level_count + 1):
                self._check_links(level)
            if self.has_s2_cells:
                self._check_nesting()
            for level in range(1, self.level_count + 1):
                tokens = self.tokens(level, np.arange(self.cell_counts[level - 1]))
                for ordinal, token in enumerate(tokens):
                    self._check_record(transaction, level, ordinal, token)

    def _check_links(self, level: int) -> None:
        problem = _link_problem(self.parents(level), level, self.cell_counts)
        if problem:
            raise BundleInconsistentError(f"{self._environment.file}: {problem}")

    def _check_nesting(self) -> None:
        above: NDArray[np.uint64] | None = None
        for level in range(1, self.level_count + 1):
            cells = self.cell_ids(level)
            problem = _nesting_problem(cells, above, self.parents(level), level)
            if problem:
                raise BundleInconsistentError(f"{self._environment.file}: {problem}")
            above = cells

    def _check_record(self, transaction: lmdb.Transaction, level: int, ordinal: int, token: str) -> None:
        where = f"{self._environment.file}: cell {ordinal} of level {level}"
        cell = self._read_record(transaction, level, ordinal)
        if self._look_up(transaction, token, level) != [(level, ordinal)]:
            raise BundleInconsistentError(f"{where}: its token {token!r} is not found by look-up")
        children = self.children(level, ordinal)
        expected = [
            ("token", cell.token, token),
            ("level", cell.level, level),
            ("ordinal", cell.ordinal, ordinal),
            ("parent", cell.parent_ordinal if cell.HasField("parent_ordinal") else -1, self.parents(level)[ordinal]),
            ("first child", cell.first_child_ordinal, children.start),
            ("last child", cell.last_child_ordinal + cell.HasField("last_child_ordinal"), children.stop),
        ]
        if level == self.level_count:
            leaves = self.leaves
            expected += [
                ("latitude", cell.mean.latitude_deg, leaves.latitude_deg[ordinal]),
                ("longitude", cell.mean.longitude_deg, leaves.longitude_deg[ordinal]),
                ("spread", cell.spread_km, leaves.spread_km[ordinal]),
                ("area", cell.area_km2, leaves.area_km2[ordinal]),
                ("sample count", cell.sample_count, leaves.sample_counts[ordinal]),
            ]
        for name, recorded, other in expected:
            if recorded != other:
                raise BundleInconsistentError(f"{where}: its record has the {name} {recorded!r}, the tree {other!r}")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction]:
        file = self._environment.file
        if self._closed:
            raise RuntimeError(f"the cell tree {file} is closed")
        try:
            with _corruption_of(file), self._environment.lmdb.begin() as transaction:
                yield transaction
        except BundleCorruptError as error:
            # Another thread that closes the tree takes the transaction from under this one.
            if self._closed:
                raise RuntimeError(f"the cell tree {file} was closed while it was read") from error
            raise

    def _read_record(self, transaction: lmdb.Transaction, level: int, ordinal: int) -> cell_pb2.Cell:
        value = transaction.get(_cell_key(level, ordinal), db=self._environment.cells)
        if value is None:
            raise BundleCorruptError(
                f"{self._environment.file}: the record of cell {ordinal} of level {level} is missing"
            )
        return cell_pb2.Cell.FromString(bytes(value))

    def _read_place(self, transaction: lmdb.Transaction, level: int, ordinal: int) -> Place | None:
        self._check_ordinal(level, ordinal)
        cell = self._read_record(transaction, level, ordinal)
        if not cell.HasField("place"):
            return None
        place = cell.place
        return Place(place.city, place.region, place.country, place.country_code, place.distance_km)

    def _look_up(self, transaction: lmdb.Transaction, token: str, level: int | None) -> list[tuple[int, int]]:
        """(level, ordinal) of the cells with a token, coarsest first."""
        prefix = token.encode("utf-8", "surrogatepass") + b"\x00"
        if len(prefix) > MAX_TOKEN_BYTES + 1:
            return []
        found = []
        cursor = transaction.cursor(db=self._environment.tokens)
        more = cursor.set_range(prefix + bytes([level or 0]))
        while more and (key := bytes(cursor.key())).startswith(prefix) and len(key) == len(prefix) + 1:
            found.append((key[-1], struct.unpack(">I", cursor.value())[0]))
            more = cursor.next()
        return found if level is None else [entry for entry in found[:1] if entry[0] == level]

    def _check_level(self, level: int) -> None:
        if not 1 <= level <= self.level_count:
            raise LevelOutOfRangeError(f"level is {level}, but this index has the levels 1 to {self.level_count}")

    def _check_ordinal(self, level: int, ordinal: int) -> None:
        self._check_level(level)
        count = self.cell_counts[level - 1]
        if not 0 <= ordinal < count:
            raise CellUnknownError(f"level {level} has the ordinals 0 to {count - 1}, not {ordinal}")


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The tokens of all cells, level after level.

    Attributes:
        text: The tokens in UTF-8, one after the other.
        bounds: (n + 1,) where each begins, and where the last ends.
        level_starts: (L,) row of the first cell of each level.
    """

    text: bytes
    bounds: NDArray[np.int64]
    level_starts: NDArray[np.int64]

    def of(self, rows: NDArray[np.int64]) -> list[str]:
        """Tokens of some rows."""
        begins, ends = self.bounds[rows].tolist(), self.bounds[rows + 1].tolist()
        return [self.text[begin:end].decode() for begin, end in zip(begins, ends, strict=True)]


def _join_tokens(columns: dict[str, NDArray[Any]], level_count: int) -> _Tokens:
    """Takes the tokens out of the columns of a tree."""
    texts = [columns.pop(f"{level}/tokens") for level in range(1, level_count + 1)]
    ends = [columns.pop(f"{level}/token_ends").astype(np.int64) for level in range(1, level_count + 1)]
    sizes, counts = [len(text) for text in texts], [len(level_ends) for level_ends in ends]
    shifted = [level_ends + before for level_ends, before in zip(ends, _starts(sizes), strict=True)]
    bounds = np.concatenate([np.zeros(1, np.int64), *shifted])
    return _Tokens(b"".join(text.tobytes() for text in texts), bounds, _starts(counts))


def _starts(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Where parts of these sizes begin in a row of them."""
    return np.cumsum([0, *sizes[:-1]])


@dataclass(eq=False)
class _Environment:
    """An LMDB environment shared by the trees that are open on it."""

    file: Path
    key: tuple[int, int]
    lmdb: lmdb.Environment
    cells: _Database
    tokens: _Database
    columns: _Database
    users: int = 1


# LMDB forbids a process to open one file twice, yet a server and a check of its bundle both read it.
_environments: dict[tuple[int, int], _Environment] = {}
_environments_lock = threading.Lock()


def _acquire(data: Path) -> _Environment:
    status = data.stat()
    key = (status.st_dev, status.st_ino)
    with _environments_lock:
        shared = _environments.get(key)
        if shared is not None:
            shared.users += 1
            return shared
        with _corruption_of(data):
            opened = lmdb.open(
                str(data.parent),
                map_size=max(status.st_size, 1),
                max_dbs=3,
                readonly=True,
                lock=False,
                create=False,
                readahead=False,
            )
            try:
                pages = opened.info()["last_pgno"] + 1
                if pages * opened.stat()["psize"] > status.st_size:
                    # Reading a mapped page beyond the end of the file would end the process.
                    raise BundleCorruptError(f"{data} is truncated: {status.st_size} bytes for {pages} pages")
                cells, tokens, columns = (opened.open_db(name, create=False) for name in _DATABASES)
            except BaseException:
                opened.close()
                raise
        shared = _Environment(data, key, opened, cells, tokens, columns)
        _environments[key] = shared
        return shared


def _release(environment: _Environment) -> None:
    with _environments_lock:
        environment.users -= 1
        if environment.users == 0:
            del _environments[environment.key]
            environment.lmdb.close()


@contextlib.contextmanager
def _corruption_of(file: Path) -> Iterator[None]:
    """Says which file is damaged when LMDB or protobuf cannot read it."""
    try:
        yield
    except (lmdb.Error, DecodeError, UnicodeDecodeError, struct.error) as error:
        raise BundleCorruptError(f"{file} is damaged or not a cell tree: {error}; publish the bundle again") from error


def _read_counts(environment: _Environment) -> tuple[int, ...]:
    with environment.lmdb.begin() as transaction:
        value = transaction.get(_LEVELS_KEY, db=environment.columns)
    if not value or len(value) % 4:
        raise BundleCorruptError(f"{environment.file}: the column of level sizes is missing or damaged")
    return tuple(int(count) for count in np.frombuffer(value, "<u4"))


def _read_columns(environment: _Environment, counts: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    columns: dict[str, NDArray[Any]] = {}
    with environment.lmdb.begin() as transaction:

        def read(name: str, dtype: DTypeLike, count: int | None) -> NDArray[Any]:
            value = transaction.get(name.encode(), db=environment.columns)
            size = np.dtype(dtype).itemsize
            if value is None or len(value) % size or (count is not None and len(value) != count * size):
                raise BundleCorruptError(f"{environment.file}: the column {name!r} is missing or of the wrong length")
            return np.frombuffer(value, dtype)

        for level, count in enumerate(counts, start=1):
            parents = (
                np.full(count, -1, np.int64) if level == 1 else read(f"{level}/parents", "<u4", count).astype("<i8")
            )
            parents.flags.writeable = False
            columns[f"{level}/parents"] = parents
            ends = columns[f"{level}/token_ends"] = read(f"{level}/token_ends", "<u4", count)
            columns[f"{level}/tokens"] = read(f"{level}/tokens", np.uint8, int(ends[-1]) if count else 0)
            if transaction.get(f"{level}/s2_level_range".encode(), db=environment.columns) is not None:
                columns[f"{level}/s2_level_range"] = read(f"{level}/s2_level_range", np.uint8, 2)
        for name, dtype in _LEAF_COLUMNS.items():
            columns[f"{len(counts)}/{name}"] = read(f"{len(counts)}/{name}", dtype, counts[-1])
    return columns


def _write_records(
    transaction: lmdb.Transaction, database: _Database, levels: Sequence[CellRows], *, store_outlines: bool
) -> None:
    for level, rows in enumerate(levels, start=1):
        below = levels[level].parents if level < len(levels) else None
        starts = None if below is None else np.searchsorted(below, np.arange(len(rows.tokens) + 1))
        for ordinal, token in enumerate(rows.tokens):
            cell = cell_pb2.Cell(
                token=token,
                level=level,
                ordinal=ordinal,
                mean=cell_pb2.Coordinate(
                    latitude_deg=rows.mean_latitude_deg[ordinal], longitude_deg=rows.mean_longitude_deg[ordinal]
                ),
                spread_km=rows.spread_km[ordinal],
                sample_count=int(rows.sample_counts[ordinal]),
                area_km2=rows.area_km2[ordinal],
            )
            if store_outlines or rows.s2_levels is None:
                _set_outline(cell, rows.outlines[ordinal])
            if level > 1:
                cell.parent_ordinal = int(rows.parents[ordinal])
            if starts is not None:
                cell.first_child_ordinal = int(starts[ordinal])
                cell.last_child_ordinal = int(starts[ordinal + 1]) - 1
            if rows.s2_levels is not None:
                cell.s2_level = int(rows.s2_levels[ordinal])
            place = rows.places[ordinal] if rows.places else None
            if place is not None:
                cell.place.CopyFrom(
                    cell_pb2.Place(
                        city=place.city,
                        region=place.region,
                        country=place.country,
                        country_code=place.country_code,
                        distance_km=place.distance_km,
                    )
                )
            value = cell.SerializeToString(deterministic=True)
            transaction.put(_cell_key(level, ordinal), value, db=database, append=True)


def _write_tokens(transaction: lmdb.Transaction, database: _Database, levels: Sequence[CellRows]) -> None:
    entries = sorted(
        (token.encode() + b"\x00" + bytes([level]), ordinal)
        for level, rows in enumerate(levels, start=1)
        for ordinal, token in enumerate(rows.tokens)
    )
    for key, ordinal in entries:
        transaction.put(key, struct.pack(">I", ordinal), db=database, append=True)


def _write_columns(transaction: lmdb.Transaction, database: _Database, levels: Sequence[CellRows]) -> None:
    columns: dict[str, NDArray[Any]] = {_LEVELS_KEY.decode(): np.array([len(rows.tokens) for rows in levels], "<u4")}
    for level, rows in enumerate(levels, start=1):
        if level > 1:
            columns[f"{level}/parents"] = rows.parents.astype("<u4")
        encoded = [token.encode() for token in rows.tokens]
        columns[f"{level}/tokens"] = np.frombuffer(b"".join(encoded), np.uint8)
        columns[f"{level}/token_ends"] = np.cumsum([len(token) for token in encoded]).astype("<u4")
        if rows.s2_levels is not None:
            columns[f"{level}/s2_level_range"] = np.array([rows.s2_levels.min(), rows.s2_levels.max()], np.uint8)
    leaves = levels[-1]
    arrays = (
        leaves.mean_latitude_deg,
        leaves.mean_longitude_deg,
        leaves.spread_km,
        leaves.area_km2,
        leaves.sample_counts,
    )
    for (name, dtype), array in zip(_LEAF_COLUMNS.items(), arrays, strict=True):
        columns[f"{len(levels)}/{name}"] = np.asarray(array).astype(dtype)
    for name, array in columns.items():
        transaction.put(name.encode(), array.tobytes(), db=database)


def _with_outline(cell: cell_pb2.Cell) -> cell_pb2.Cell:
    """Adds the outline of an S2 cell to a record that was stored without it."""
    if cell.HasField("s2_level") and not cell.outline:
        _set_outline(cell, geodesy.cell_id_to_outline(geodesy.token_to_cell_id([cell.token]))[0])
    return cell


def _set_outline(cell: cell_pb2.Cell, outline: NDArray[np.float64]) -> None:
    for latitude, longitude in outline.tolist():
        cell.outline.add(latitude_deg=latitude, longitude_deg=longitude)


def _cell_key(level: int, ordinal: int) -> bytes:
    return struct.pack(">BI", level, ordinal)


def _map_size(levels: Sequence[CellRows]) -> int:
    """An upper bound of the bytes that a tree needs before it is compacted; the file is only as large as its data."""
    cells = sum(len(rows.tokens) for rows in levels)
    corners = sum(len(outline) for rows in levels for outline in rows.outlines)
    return (64 << 20) + cells * 4096 + corners * 64


def _validate_rows(levels: Sequence[CellRows]) -> None:
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise ValueError(f"a tree has 1 to {MAX_LEVELS} levels, not {len(levels)}")
    counts = tuple(len(rows.tokens) for rows in levels)
    if len({rows.s2_levels is None for rows in levels}) > 1:
        raise ValueError("s2_levels are given for some levels and not for others")
    for level, rows in enumerate(levels, start=1):
        _validate_columns(rows, level)
        _validate_tokens(rows, level)
        problem = _link_problem(np.asarray(rows.parents), level, counts)
        if problem:
            raise ValueError(problem)
    if levels[0].s2_levels is None:
        return
    ids = [geodesy.token_to_cell_id(rows.tokens) for rows in levels]
    for level, (cells, rows) in enumerate(zip(ids, levels, strict=True), start=1):
        problem = _nesting_problem(cells, ids[level - 2] if level > 1 else None, np.asarray(rows.parents), level)
        if problem:
            raise ValueError(problem)


def _validate_columns(rows: CellRows, level: int) -> None:
    count = len(rows.tokens)
    if count == 0:
        raise ValueError(f"level {level} has no cells")
    for name in ("parents", "mean_latitude_deg", "mean_longitude_deg", "spread_km", "area_km2", "sample_counts"):
        if np.shape(getattr(rows, name)) != (count,):
            raise ValueError(f"level {level}: {name} has the shape {np.shape(getattr(rows, name))}, not ({count},)")
    if len(rows.outlines) != count or len(rows.places) not in (0, count):
        raise ValueError(f"level {level}: {count} cells, {len(rows.outlines)} outlines and {len(rows.places)} places")
    geodesy.validate_coordinates(rows.mean_latitude_deg, rows.mean_longitude_deg)
    if rows.s2_levels is not None:
        if np.shape(rows.s2_levels) != (count,):
            raise ValueError(f"level {level}: s2_levels has the shape {np.shape(rows.s2_levels)}, not ({count},)")
        actual = geodesy.cell_id_to_s2_level(geodesy.token_to_cell_id(list(rows.tokens)))
        wrong = np.flatnonzero(actual != rows.s2_levels)
        if wrong.size:
            row = int(wrong[0])
            raise ValueError(
                f"level {level}, row {row}: the cell {rows.tokens[row]!r} is of S2 level {actual[row]}, "
                f"not {rows.s2_levels[row]}"
            )


def _validate_tokens(rows: CellRows, level: int) -> None:
    seen: set[str] = set()
    for ordinal, token in enumerate(rows.tokens):
        if not token or "\x00" in token or len(token.encode()) > MAX_TOKEN_BYTES:
            raise ValueError(
                f"level {level}, row {ordinal}: the token {token!r} is empty, holds a NUL or is longer than "
                f"{MAX_TOKEN_BYTES} bytes"
            )
        if token in seen:
            raise ValueError(f"level {level}, row {ordinal}: the token {token!r} stands twice on the level")
        seen.add(token)


def _link_problem(parents: NDArray[np.int64], level: int, counts: tuple[int, ...]) -> str | None:
    """What is wrong with a level's parents, if anything."""
    if level == 1:
        return None if bool((parents == -1).all()) else "level 1 has parents, but there is no level above it"
    above = counts[level - 2]
    outside = np.flatnonzero((parents < 0) | (parents >= above))
    if outside.size:
        row = int(outside[0])
        return f"cell {row} of level {level} has the parent {parents[row]}, but level {level - 1} has {above} cells"
    scattered = np.flatnonzero(np.diff(parents) < 0)
    if scattered.size:
        row = int(scattered[0]) + 1
        return f"cell {row} of level {level} is apart from its siblings: parents must not decrease along a level"
    childless = np.flatnonzero(np.bincount(parents, minlength=above) == 0)
    if childless.size:
        return f"cell {int(childless[0])} of level {level - 1} has no child, so no path leads from it to a leaf"
    return None


def _nesting_problem(
    cells: NDArray[np.uint64], above: NDArray[np.uint64] | None, parents: NDArray[np.int64], level: int
) -> str | None:
    """What is wrong with the order of a level's S2 cells, or with their places inside those of the level above."""
    first, last = geodesy.cell_id_range(cells)
    disordered = np.flatnonzero(first[1:] <= last[:-1])
    if disordered.size:
        row = int(disordered[0])
        one, other = geodesy.cell_id_to_token(cells[row : row + 2])
        return (
            f"cells {row} and {row + 1} of level {level}, {one!r} and {other!r}, overlap or are out of order: the S2 "
            "cells of a level must be disjoint and ascend along the Hilbert curve"
        )
    if above is None:
        return None
    above_first, above_last = geodesy.cell_id_range(above)
    outside = np.flatnonzero((first < above_first[parents]) | (last > above_last[parents]))
    if outside.size:
        row = int(outside[0])
        child, parent = (geodesy.cell_id_to_token(ids)[0] for ids in (cells[[row]], above[parents[[row]]]))
        return f"cell {row} of level {level}, {child!r}, is not inside its parent {parent!r}"
    return None
