"""Opens bundles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from geosurge.bundle.files import file_problems
from geosurge.bundle.manifest import ENCODER_DIRECTORY, MANIFEST_FILE, TREE_FILE, Manifest, parse_manifest
from geosurge.errors import BundleCorruptError, BundleNotFoundError, BundlePartialError


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
    for problem in file_problems(path, manifest):
        raise problem.error
    return Bundle(path, manifest)
