"""What is there to be geotagged: pictures in folders, in lists of paths and in tar shards, found one after the other.

- **Folders** are searched to the bottom, sorted by name. A picture is told by its extension (`PICTURE_EXTENSIONS`) or,
  where a run has globs, by these alone. Hidden files and folders, XMP sidecars and what an ignore file names (see
  `geosurge.archive.sources.ignores`) are passed over.
- **Lists** (see `geosurge.archive.sources.lists`) name pictures, whatever their extension; relative paths start from
  the list's folder.
- **Shards** are uncompressed tar files. A shard counts as one where it is a source, in a list, or taken by a glob; a
  tar that merely lies in a folder is passed over. Of members of the same name the last one counts.

Links are followed, and everything has one name however it was reached, so that overlapping sources give the same paths:
folders go by their real path, and a link to a file stands for that file. There are two exceptions. What a link leads to
is left to the search of the source in which it lies anyway; and where the file itself is hidden or has no picture's
name, as in the object stores of git-annex and DVC, the link is the picture.

Whatever cannot be read is found with the error that says why. Memory is that of the longest single folder.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from geosurge.archive.sources.counts import ScanCounts
from geosurge.archive.sources.found import Found
from geosurge.archive.sources.ignores import IgnoreRules
from geosurge.archive.sources.lists import LIST_EXTENSIONS, check_list, read_list
from geosurge.archive.sources.paths import extension, is_hidden, join, not_readable, open_regular, shown, within
from geosurge.archive.sources.patterns import Patterns
from geosurge.archive.sources.shards import SHARD_EXTENSION, Member, MemberKind, read_latest_members
from geosurge.errors import InputNotReadableError, ShardInvalidError, UsageError

PICTURE_EXTENSIONS: Final = frozenset(
    # Formats that are read, then others, whose owners are better told than passed over: modern ones and camera raws.
    b"jpg jpeg jpe jfif mpo png webp tif tiff gif bmp dib heic heif hif avif jxl jp2 j2k jpf jpx 3fr arw cr2 cr3 crw "
    b"dcr dng erf fff gpr iiq k25 kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f".split()
)

_SIDECAR_EXTENSION: Final = b"xmp"
_COMPRESSED_SHARDS: Final = (b".tgz", b".tbz2", b".txz", b".tar.gz", b".tar.bz2", b".tar.xz", b".tar.zst", b".tar.lz4")

_MAX_NAME_BYTES: Final = 4096
_SHOWN_NAME_BYTES: Final = 60

_NOT_IN_ONE_PIECE: Final = {
    MemberKind.SYMBOLIC_LINK: "is a link, and a shard holds nothing for it",
    MemberKind.SPARSE_FILE: "is stored as a sparse file, in several pieces",
    MemberKind.SPECIAL: "is no file, but a device or a pipe",
}


def scan(sources: Sequence[str | Path], globs: Sequence[str] = (), counts: ScanCounts | None = None) -> Iterator[Found]:
    """Finds pictures.

    Args:
        sources: Folders, lists, shards and single pictures.
        globs: Patterns in the syntax of gitignore: what they match is taken, whatever its extension; ``!`` leaves out
            what it matches. They apply to paths from the source on, which may be a folder or a shard, and not to lists.
            Without any, extensions decide.
        counts: Where to count what is passed over.

    Returns:
        What is found, in the order of the sources and of names within a folder. Something can come more than once, by
        the same path and member, if lists or links name it repeatedly.

    Raises:
        UsageError: A source does not exist or is nothing of the above, or a glob is no pattern; raised before anything
            is searched.
    """
    try:
        patterns = Patterns.parse(globs) if globs else None
    except ValueError as error:
        raise UsageError(f"a glob cannot be used: {error}; correct it") from error
    # A source that is given twice is searched once.
    resolved = list(dict.fromkeys(_resolve(source) for source in sources))
    return _Scan(resolved, patterns, counts or ScanCounts()).run()


def is_picture(path: bytes) -> bool:
    """Whether a file is a picture by its extension."""
    return extension(path) in PICTURE_EXTENSIONS


@dataclass(frozen=True)
class _Source:
    """A source; a folder goes by its real path."""

    path: bytes
    kind: Literal["folder", "list", "shard", "picture"]


def _resolve(source: str | Path) -> _Source:
    """Tells what a source is.

    Raises:
        UsageError: It does not exist, or is of no use.
    """
    path = os.fsencode(Path(source).absolute())
    try:
        real = os.path.realpath(path, strict=True)
        is_folder = stat.S_ISDIR(os.lstat(real).st_mode)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"there is no source {shown(path)}: {why}; check the path") from error
    if is_folder:
        return _Source(real, "folder")
    if path.lower().endswith(_COMPRESSED_SHARDS):
        raise UsageError(f"{shown(path)} is a compressed shard; unpack it to a plain tar")
    if extension(path) in LIST_EXTENSIONS:
        try:
            check_list(path)
        except InputNotReadableError as error:
            raise UsageError(str(error)) from error
        return _Source(path, "list")
    if extension(path) == SHARD_EXTENSION:
        return _Source(real, "shard")
    if is_picture(path):
        return _Source(path, "picture")
    raise UsageError(
        f"{shown(path)} is no folder, no list of paths (.txt, .csv, .parquet), no shard (.tar) and no picture"
    )


@dataclass(frozen=True)
class _Folder:
    """A folder to be searched.

    Attributes:
        path: Its real path.
        relative: Its path from the source on, through links, with a slash at the end; empty for the source itself.
        rules: The ignore files above it.
    """

    path: bytes
    relative: bytes
    rules: IgnoreRules


class _Scan:
    """One search, which remembers the folders that links have led it to."""

    def __init__(self, sources: Sequence[_Source], globs: Patterns | None, counts: ScanCounts) -> None:
        self._sources = sources
        self._roots = frozenset(source.path for source in sources if source.kind == "folder")
        self._globs = globs
        self._counts = counts
        self._linked_folders: set[bytes] = set()
        # Entries of a list often lie in one folder after another.
        self._real_folder = functools.lru_cache(maxsize=4096)(os.path.realpath)

    def run(self) -> Iterator[Found]:
        for source in self._sources:
            match source.kind:
                case "folder":
                    yield from self._search(source.path)
                case "list":
                    yield from self._listed(source.path)
                case "shard":
                    yield from self._members(source.path, self._globs)
                case "picture":
                    yield from self._named(source.path)

    def _search(self, root: bytes) -> Iterator[Found]:
        # Folders may be nested deeper than Python calls.
        stack = [self._entries(_Folder(root, b"", IgnoreRules()))]
        while stack:
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
            elif isinstance(entry, Found):
                yield entry
            else:
                stack.append(self._entries(entry))

    def _entries(self, folder: _Folder) -> Iterator[Found | _Folder]:
        """What is in one folder, by name: pictures, what cannot be read, and folders that are to be searched."""
        try:
            # Where nothing in it may be opened, it is not its ignore file that its owner has to look at.
            os.lstat(join(folder.path, b"."))
            rules = folder.rules.within(folder.path, folder.relative)
        except OSError as error:
            yield _unreadable(folder.path, error)
            return
        except InputNotReadableError as error:
            # What its owner wants to be left alone is not known.
            yield Found(folder.path, error=error)
            return
        names: list[bytes] = []
        try:
            with os.scandir(folder.path) as entries:
                for entry in entries:
                    if self._is_wanted(entry, folder, rules):
                        names.append(entry.name)  # noqa: PERF401 - what comes before an error counts
        except OSError as error:
            yield _unreadable(folder.path, error)
        for name in sorted(names):
            path, relative = join(folder.path, name), folder.relative + name
            try:
                status = os.lstat(path)
                if stat.S_ISLNK(status.st_mode):
                    yield from self._behind_link(path, relative, folder, rules)
                elif not stat.S_ISDIR(status.st_mode):
                    yield from self._taken(path, status)
                # What lies in two sources belongs to the inner one.
                elif path not in self._roots:
                    yield _Folder(path, relative + b"/", rules)
            except OSError as error:
                yield _unreadable(path, error)

    def _is_wanted(self, entry: os.DirEntry[bytes], folder: _Folder, rules: IgnoreRules) -> bool:
        relative, is_folder = folder.relative + entry.name, entry.is_dir(follow_symlinks=False)
        if is_hidden(entry.name) or rules.ignores(relative, is_folder=is_folder):
            self._counts.ignored += 1
            return False
        # What a link stands for is known only at its end.
        if is_folder or entry.is_symlink() or _is_taken(relative, self._globs):
            return True
        self._counts.add_other_file(entry.name)
        return False

    def _behind_link(
        self, link: bytes, relative: bytes, folder: _Folder, rules: IgnoreRules
    ) -> Iterator[Found | _Folder]:
        try:
            target = os.path.realpath(link, strict=True)
        except FileNotFoundError:
            # Nobody misses what has no picture's name.
            if _is_taken(relative, self._globs):
                raise
            self._counts.add_other_file(link)
            return
        status = os.lstat(target)
        is_folder = stat.S_ISDIR(status.st_mode)
        if is_folder and within(folder.path, target) is not None:
            why = "a link to a folder that it lies in, so that there is no end to it; remove it, or have it ignored"
            yield Found(link, error=InputNotReadableError(f"{shown(link)} is {why}"))
        elif not is_folder and not _is_taken(relative, self._globs):
            self._counts.add_other_file(link)
        elif self._is_searched_anyway(target, is_folder=is_folder) or target in self._linked_folders:
            self._counts.links += 1
        elif is_folder:
            # Links between folders multiply: each is followed once.
            self._linked_folders.add(target)
            yield _Folder(target, relative + b"/", rules)
        else:
            yield from self._taken(_name_of_linked(link, target), status)

    def _is_searched_anyway(self, target: bytes, *, is_folder: bool) -> bool:
        """Whether something lies in a source, where it is found, or else left out, by its own path."""
        for root in self._roots:
            relative = within(target, root)
            if relative is not None and not is_hidden(relative) and (is_folder or _is_taken(relative, self._globs)):
                return True
        return False

    def _taken(self, path: bytes, status: os.stat_result) -> Iterator[Found]:
        """What a file stands for that is wanted by its name, or for itself."""
        if extension(path) == SHARD_EXTENSION and stat.S_ISREG(status.st_mode):
            yield from self._members(path, None)
        else:
            yield _picture(path, status)

    def _listed(self, path: bytes) -> Iterator[Found]:
        folder = path.rpartition(b"/")[0]
        try:
            for entry in read_list(path):
                yield from self._named(entry if entry.startswith(b"/") else join(folder, entry))
        except InputNotReadableError as error:
            yield Found(path, error=error)

    def _named(self, path: bytes) -> Iterator[Found]:
        """What a path stands for that was given for itself."""
        try:
            folder, _, name = path.rpartition(b"/")
            if name in {b"", b".", b".."}:
                path = self._real_folder(path)
            else:
                path = join(self._real_folder(folder or b"/"), name)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                target = os.path.realpath(path, strict=True)
                path, status = _name_of_linked(path, target), os.lstat(target)
        except (OSError, ValueError) as error:
            yield _unreadable(path, error)
        else:
            yield from self._taken(path, status)

    def _members(self, path: bytes, globs: Patterns | None) -> Iterator[Found]:
        try:
            with open_regular(path) as shard:
                mtime_ns = os.fstat(shard.fileno()).st_mtime_ns
                for member in read_latest_members(shard, shown(path)):
                    if self._is_wanted_member(member, globs):
                        error = _member_error(path, member)
                        yield Found(path, member.name, member.size, mtime_ns, member.offset, error)
        except ShardInvalidError as error:
            yield Found(path, error=error)
        except OSError as error:
            yield _unreadable(path, error)

    def _is_wanted_member(self, member: Member, globs: Patterns | None) -> bool:
        if member.kind is MemberKind.FOLDER:
            return False
        if is_hidden(member.name):
            self._counts.ignored += 1
        elif not _is_taken(member.name, globs):
            self._counts.add_other_file(member.name)
        elif member.kind is MemberKind.HARD_LINK:
            self._counts.links += 1
        else:
            return True
        return False


def _is_taken(name: bytes, globs: Patterns | None) -> bool:
    if globs is None:
        return is_picture(name)
    return extension(name) != _SIDECAR_EXTENSION and bool(globs.match(name))


def _picture(path: bytes, status: os.stat_result) -> Found:
    if stat.S_ISREG(status.st_mode):
        return Found(path, size=status.st_size, mtime_ns=status.st_mtime_ns)
    if stat.S_ISDIR(status.st_mode):
        why = "a folder, not a picture; give it as a source of its own"
    else:
        why = "a pipe, a socket or a device, not a file; leave it out"
    return Found(path, error=InputNotReadableError(f"{shown(path)} is {why}"))


def _member_error(path: bytes, member: Member) -> ShardInvalidError | None:
    if len(member.name) > _MAX_NAME_BYTES:
        beginning = shown(member.name[:_SHOWN_NAME_BYTES])
        return ShardInvalidError(
            f"{beginning}... in {shown(path)} has a name of {len(member.name)} bytes, more than any system takes; "
            "pack the shard again with shorter names"
        )
    if (what := _NOT_IN_ONE_PIECE.get(member.kind)) is None:
        return None
    return ShardInvalidError(f"{shown(member.name)} in {shown(path)} {what}; pack the shard again with the file itself")


def _unreadable(path: bytes, error: OSError | ValueError) -> Found:
    return Found(path, error=not_readable(path, error))


def _name_of_linked(link: bytes, target: bytes) -> bytes:
    """The path that a linked file goes by."""
    return target if is_picture(target) and not is_hidden(target) else link
