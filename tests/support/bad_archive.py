"""An archive of bad files: each kind of thing that a run over somebody's pictures must survive, with the row it gives.

"Bad" is what looks so: some, like a picture with a broken EXIF block or a name that is not UTF-8, are located.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from geosurge.archive.rows import Status

MAX_BYTES = 20_000_000
"""Limit that the files of `oversized` are for: the engine's own."""

DONE, FAILED = Status.DONE, Status.FAILED

Expected = dict[str, tuple[Status, str]]
"""Status and reason of a row by its path."""


def picture(seed: int, file_format: str = "JPEG", size: tuple[int, int] = (96, 64), **options: object) -> bytes:
    """A picture with neither position nor anything else in its metadata."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(seed: int, count: int) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def bomb(seed: int) -> bytes:
    """A PNG of a few hundred bytes that announces 900 million pixels."""
    data = bytearray(picture(seed, "PNG", (16, 16)))
    struct.pack_into(">II", data, 16, 30_000, 30_000)
    return bytes(data)


def damaged_png(seed: int) -> bytes:
    """A PNG that is all there, with a few bytes overwritten."""
    data = bytearray(picture(seed, "PNG"))
    middle = len(data) // 2
    data[middle : middle + 16] = noise(seed, 16)
    return bytes(data)


def with_exif(seed: int, block: bytes) -> bytes:
    """A JPEG with an EXIF segment of any content."""
    data = picture(seed)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + data[2:]


def dangling_exif(seed: int) -> bytes:
    """An EXIF block whose directory lies far behind its end."""
    return with_exif(seed, b"II*\0" + struct.pack("<I", 0x7FFFFFFF) + noise(seed, 40))


def with_gps(seed: int, latitude_deg: float, longitude_deg: float) -> bytes:
    """A JPEG that says it was taken at a place, be it one or not."""
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: "N", 2: (latitude_deg, 0.0, 0.0), 3: "E", 4: (longitude_deg, 0.0, 0.0)})
    return picture(seed, exif=exif)


def boxes(brand: bytes, seed: int, family: bytes = b"mif1") -> bytes:
    """The start of a file of ISO base media, as of HEIC, AVIF and MP4."""
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + family + brand + b"\0\0\x10\0mdat" + noise(seed, 4088)


def float_tiff(seed: int) -> bytes:
    """A TIFF of 32-bit samples, to which no value is white."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).random((48, 64), dtype=np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


_FOREIGN_SIDECAR = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4" xmp:Label="{}"/></rdf:RDF></x:xmpmeta>"""
_ENTITIES = """<!DOCTYPE x [<!ENTITY a "{}">{}]><x>&n7;</x>"""


def endless_sidecar(seed: int) -> bytes:
    """XML of a kilobyte that would expand to a billion words."""
    names = "abcdefgn"
    nested = "".join(f'<!ENTITY {b}7 "{f"&{a}7;" * 10}">' for a, b in itertools.pairwise(names))
    return _ENTITIES.format(seed, nested).encode()


@dataclass(frozen=True)
class Kind:
    """A kind of bad file.

    Attributes:
        name: Name, with a place for a number; bytes that are no text as `os.fsdecode` has them.
        make: Makes it, given its path and a seed.
        status: Status of its row.
        reason: The row's reason.
        shown: Name in the row, where that is another.
        needs_permissions: Whether it is bad only to somebody whom permissions bind.
    """

    name: str
    make: Callable[[Path, int], object]
    status: Status = FAILED
    reason: str = ""
    shown: str = ""
    needs_permissions: bool = False


def _file(name: str, reason: str, content: Callable[[int], bytes], shown: str = "") -> Kind:
    return Kind(name, lambda path, seed: path.write_bytes(content(seed)), FAILED if reason else DONE, reason, shown)


def _sidecar(name: str, reason: str, content: Callable[[int], bytes]) -> Kind:
    def make(path: Path, seed: int) -> None:
        path.write_bytes(picture(seed))
        path.with_name(f"{path.name}.xmp").write_bytes(content(seed))

    return Kind(name, make, FAILED if reason else DONE, reason)


def _oversized(path: Path, seed: int) -> None:
    path.write_bytes(picture(seed))
    # The rest is a hole, which takes no room on the disk.
    os.truncate(path, MAX_BYTES + 1 + seed)


def _folder(path: Path, seed: int) -> None:
    path.mkdir()
    (path / "inside.jpg").write_bytes(picture(seed))


def _locked_folder(path: Path, seed: int) -> None:
    _folder(path, seed)
    path.chmod(0)


def _locked_file(path: Path, seed: int) -> None:
    path.write_bytes(picture(seed))
    path.chmod(0)


def _unreadable(name: str, make: Callable[[Path, int], object], *, needs_permissions: bool = False) -> Kind:
    return Kind(name, make, FAILED, "INPUT_NOT_READABLE", needs_permissions=needs_permissions)


_UNSUPPORTED, _TRUNCATED = "IMAGE_FORMAT_UNSUPPORTED", "IMAGE_TRUNCATED"

CONTENTS: tuple[Kind, ...] = (
    _file("empty-{}.jpg", "IMAGE_EMPTY", lambda seed: b""),
    _file("film-{}.jpg", _UNSUPPORTED, lambda seed: boxes(b"isom", seed, b"mp41")),
    _file("bomb-{}.png", "IMAGE_TOO_MANY_PIXELS", bomb),
    _file("truncated-{}.jpg", _TRUNCATED, lambda seed: picture(seed)[: -200 - seed % 100]),
    _file("truncated-{}.png", _TRUNCATED, lambda seed: picture(seed, "PNG")[: -200 - seed % 100]),
    _file("text-{}.jpg", "IMAGE_NOT_DECODABLE", lambda seed: b"Dear diary, number %d\n" % seed * 40),
    _file("noise-{}.JPG", "IMAGE_NOT_DECODABLE", lambda seed: b"\0" + noise(seed, 5000)),
    _file("damaged-{}.png", "IMAGE_NOT_DECODABLE", damaged_png),
    _file("document-{}.jpeg", _UNSUPPORTED, lambda seed: b"%PDF-1.7\n" + noise(seed, 500)),
    _file("phone-{}.heic", "IMAGE_NOT_DECODABLE", lambda seed: boxes(b"heic", seed)),
    _file("modern-{}.avif", _UNSUPPORTED, lambda seed: boxes(b"avif", seed)),
    _file("modern-{}.jxl", _UNSUPPORTED, lambda seed: b"\0\0\0\x0cJXL \r\n\x87\n" + noise(seed, 500)),
    _file("camera-{}.CR2", _UNSUPPORTED, lambda seed: b"II*\0\x10\0\0\0CR\x02\0" + noise(seed, 500)),
    _file("tiny-{}.jpg", "IMAGE_TOO_SMALL", lambda seed: picture(seed, size=(4, 4))),
    _file("elevation-{}.tif", _UNSUPPORTED, float_tiff),
    Kind("scan-{}.jpg", _oversized, FAILED, "IMAGE_TOO_LARGE"),
    _file("broken-exif-{}.jpg", "", lambda seed: with_exif(seed, noise(seed, 900))),
    _file("dangling-exif-{}.jpg", "", dangling_exif),
    _file("null-island-{}.jpg", "", lambda seed: with_gps(seed, 0.0, 0.0)),
    _file("off-the-globe-{}.jpg", "", lambda seed: with_gps(seed, 91.0 + seed, 12.0)),
    _file("latin-\udce9\udcff-{}.jpg", "", picture, shown="latin-\\xe9\\xff-{}.jpg"),
    _file("latin-\udce9-{}.gif", "IMAGE_NOT_DECODABLE", lambda seed: noise(seed, 9) * 9, shown="latin-\\xe9-{}.gif"),
    _file("two\nlines, \"quoted\" 'n' {}.jpg", "", picture, shown="two\\x0alines, \"quoted\" 'n' {}.jpg"),
    _file("back\\xff{}.jpg", "", picture, shown="back\\\\xff{}.jpg"),
    _file("<img src=x onerror=alert(1)>-&amp;-{}.jpg", "", picture),
    _file("=cmd()-{}.jpg", "", picture),
    _file("-rf {}.jpg", "", picture),
    _file("日本 👾 {}.jpg", "", picture),
    # With the five digits of the number, as long as a file system takes; there is no room for a sidecar's name.
    _file("{:05d}" + 246 * "n" + ".jpg", "", picture),
    _sidecar("sidecar-text-{}.jpg", "SIDECAR_INVALID", lambda seed: b"rating: %d\n" % seed),
    _sidecar("sidecar-empty-{}.jpg", "SIDECAR_INVALID", lambda seed: b""),
    _sidecar("sidecar-endless-{}.jpg", "SIDECAR_INVALID", endless_sidecar),
    _sidecar("sidecar-foreign-{}.jpg", "", lambda seed: _FOREIGN_SIDECAR.format(seed).encode()),
)
"""Kinds that differ in what the file, or its sidecar, holds or is called."""

PLACES: tuple[Kind, ...] = (
    _unreadable("gone-{}.jpg", lambda path, seed: path.symlink_to(f"nowhere-{seed}")),
    _unreadable("ring-{}.jpg", lambda path, seed: path.symlink_to(path.name)),
    _unreadable("ring-{}", lambda path, seed: path.symlink_to(".")),
    _unreadable("pipe-{}.jpg", lambda path, seed: os.mkfifo(path)),
    Kind("folder-{}.jpg", _folder, DONE, shown="folder-{}.jpg/inside.jpg"),
    _unreadable("locked-{}", _locked_folder, needs_permissions=True),
    _unreadable("locked-{}.jpg", _locked_file, needs_permissions=True),
)
"""Kinds that differ in what lies at the path: a link, a pipe, a folder, something locked."""


def make_bad_archive(folder: Path, count: int | None = None, *, permissions: bool = False) -> Expected:
    """Fills a folder with bad files.

    Args:
        folder: Where; it is made when it is missing.
        count: Number of rows that they give; each kind once if not given. Kinds repeat with other content.
        permissions: Whether to make files and folders that nobody may read: a run over them has to be one that
            permissions bind, see `bound_by_permissions`.

    Returns:
        The row that each gives, by its path as outputs show it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    kinds = [kind for kind in (*CONTENTS, *PLACES) if permissions or not kind.needs_permissions]
    expected: Expected = {}
    for number, kind in enumerate(itertools.islice(itertools.cycle(kinds), count or len(kinds))):
        kind.make(folder / kind.name.format(number), number)
        expected[f"{folder}/{(kind.shown or kind.name).format(number)}"] = (kind.status, kind.reason)
    return expected


def can_bind_permissions() -> bool:
    """Whether a command can be run that may not read what its permissions forbid."""
    return os.geteuid() != 0 or shutil.which("setpriv") is not None


def bound_by_permissions(command: Sequence[str]) -> list[str]:
    """A command that permissions bind even where this process is root's, which may read everything."""
    if os.geteuid() != 0:
        return list(command)
    capabilities = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}", "--", *command]
