"""The manifest of an index bundle: what the bundle is, which files it has, and what it must answer.

``manifest.json`` describes itself too: ``manifest_sha256`` is the SHA-256 of the file's own bytes with the 64 digits of
that field set to zero. A change of any byte is noticed, and no agreement on how to format JSON is needed to check it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.metadata
import json
import operator
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from geosurge.calibration import Calibration
from geosurge.density import Kernel
from geosurge.errors import BundleCorruptError, BundleSchemaError

SCHEMA_VERSION = 1
"""Schema that this engine writes."""

READABLE_SCHEMA_VERSIONS = (1,)
"""Schemas that this engine reads."""

MANIFEST_FILE = "manifest.json"
TREE_FILE = "cells.lmdb/data.mdb"
ENCODER_DIRECTORY = "encoder"
GOLDEN_DIRECTORY = "golden"
GALLERY_DIRECTORY = "gallery"

CURRENT_FILE = "CURRENT"
"""File of a store that names its active bundle."""

HISTORY_FILE = "HISTORY"
"""File of a store that names the bundles that were active before."""

BUNDLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""What a bundle can be called: file systems have to hold the name with something around it."""

_SELF_CHECK = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_UNSEALED = "0" * 64
_LIBRARIES = ("geosurge", "faiss-cpu", "faiss-gpu", "lmdb", "numpy", "s2sphere", "safetensors", "torch", "transformers")


def check_bundle_name(name: str) -> str:
    """Gives a bundle's name back.

    Raises:
        ValueError: It cannot be one.
    """
    if not BUNDLE_NAME.fullmatch(name) or name.upper() in (CURRENT_FILE, HISTORY_FILE):
        raise ValueError(
            "a bundle's name has letters, digits, '.', '_' and '-', at most 200, starts with a letter or digit, and is "
            f"not {CURRENT_FILE} or {HISTORY_FILE}"
        )
    return name


def _check_relative_path(path: str) -> str:
    parts = path.split("/")
    if "\\" in path or "\x00" in path or path != str(PurePosixPath(path)) or any(p in ("", ".", "..") for p in parts):
        raise ValueError(f"{path!r} is not a plain path inside the bundle")
    return path


def _to_utc(time: datetime) -> datetime:
    return time.astimezone(UTC)


PointEstimator: TypeAlias = Literal["leaf", "posterior_mean", "kernel_density"]
"""`kernel_density`: where references like the query gather, see `geosurge.density`; the others as in
`geosurge.posterior`."""

BundleName = Annotated[str, AfterValidator(check_bundle_name)]
RelativePath = Annotated[str, AfterValidator(_check_relative_path)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(ge=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Domain(_Model):
    """What the bundle is for, in words."""

    can: str
    """What it locates."""
    cannot: str
    """What it does not."""
    training: str
    """What it was trained on."""


class LevelInfo(_Model):
    """One level of the hierarchy and the FAISS file that searches it."""

    level: Positive
    cells: Positive
    file: RelativePath
    storage: Literal["fp32", "fp16", "sq8"]
    s2_level_min: Annotated[int, Field(ge=0, le=30)] | None = None
    s2_level_max: Annotated[int, Field(ge=0, le=30)] | None = None


class EncoderInfo(_Model):
    """The encoder whose embeddings the index answers."""

    sha256: Sha256
    """Fingerprint over its configuration and weights."""
    preprocessing_id: str
    vision: str
    segmentation: str
    parameters: Annotated[int, Field(ge=0)]


class CalibrationInfo(_Model):
    """How scores become probabilities, fitted on held-out data."""

    temperature: Annotated[float, Field(gt=0)]
    """Divides the scores."""
    confidence_levels: tuple[float, ...]
    """Ascending from 0 to 1; what was asked for. Empty for no recalibration."""
    posterior_masses: tuple[float, ...]
    """Never decreasing; the posterior mass that holds the truth so often."""
    expected_calibration_error: Annotated[float, Field(ge=0, le=1)]
    sample_count: Positive
    source: str
    median_error_km: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict, exclude_if=operator.not_)
    """Of each point estimator that the bundle can use, on the same images."""

    @model_validator(mode="after")
    def _check_usable(self) -> CalibrationInfo:
        self.to_calibration()
        return self

    def to_calibration(self) -> Calibration:
        """The part that inference uses; what it refuses, no manifest may say."""
        return Calibration(self.temperature, self.confidence_levels, self.posterior_masses)


class GalleryInfo(_Model):
    """Reference embeddings with coordinates, leaf by leaf, and how they become a density; see `geosurge.density`."""

    references: Positive
    file: RelativePath
    """FAISS IVF index; list p holds the references in leaf p, with ids from 0 on along the lists."""
    coordinates_file: RelativePath
    """(references, 2) float32, latitude and longitude in degrees, in the order of the ids; in numpy's npy format."""
    storage: Literal["fp32", "fp16", "sq8"]
    neighbours: Annotated[int, Field(ge=1, le=256)]
    """Nearest references that take part in the density."""
    power: Annotated[float, Field(gt=0)]
    share: Annotated[float, Field(gt=0, le=1)]
    spreads: Annotated[float, Field(gt=0)]
    snap: bool

    def to_kernel(self) -> Kernel:
        """The part that inference uses."""
        return Kernel(self.power, self.share, self.spreads, self.snap)

    def with_kernel(self, kernel: Kernel) -> GalleryInfo:
        """The same gallery with another kernel."""
        return self.model_copy(update=asdict(kernel))


class GoldenQuery(_Model):
    """An embedding and the leaves that the index must answer it with, best first."""

    embedding: str
    leaves: tuple[str, ...]
    scores: tuple[float, ...]


class GoldenImage(_Model):
    """A picture in the bundle and the embedding that the encoder must make of it."""

    file: RelativePath
    embedding: str


class FileInfo(_Model):
    """What a file of the bundle must be."""

    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Manifest(_Model):
    """Everything that is known of a bundle without opening its other files.

    Embeddings are little-endian float32 in base64 (see `encode_embedding`). Of a manifest under construction, `files`
    is empty and `manifest_sha256` zero until `geosurge.bundle.finish_bundle` fills them in.
    """

    schema_version: int = SCHEMA_VERSION
    name: BundleName
    create_time: Annotated[AwareDatetime, AfterValidator(_to_utc)]
    description: str
    domain: Domain
    cell_kind: Literal["s2", "h3", "entity"] = "s2"
    levels: Annotated[tuple[LevelInfo, ...], Field(min_length=1)]
    dimension: Positive
    metric: Literal["inner_product"] = "inner_product"
    scoring: Literal["hierarchical_product"] = "hierarchical_product"
    temperatures: tuple[Annotated[float, Field(gt=0)], ...]
    default_beam_width: Positive
    point_estimator: PointEstimator
    encoder: EncoderInfo | None
    calibration: CalibrationInfo | None
    gallery: GalleryInfo | None = Field(None, exclude_if=operator.not_)
    library_versions: dict[str, str]
    golden_queries: tuple[GoldenQuery, ...] = ()
    golden_images: tuple[GoldenImage, ...] = ()
    files: dict[RelativePath, FileInfo] = Field(default_factory=dict)
    manifest_sha256: Sha256 = _UNSEALED

    @model_validator(mode="after")
    def _check_whole(self) -> Manifest:
        if [level.level for level in self.levels] != list(range(1, len(self.levels) + 1)):
            raise ValueError("levels must be numbered from 1 without a gap")
        if len(self.temperatures) != len(self.levels):
            raise ValueError(f"{len(self.levels)} levels, but {len(self.temperatures)} temperatures")
        if self.point_estimator == "kernel_density" and self.gallery is None:
            raise ValueError("the point_estimator kernel_density needs a gallery")
        if self.golden_images and self.encoder is None:
            raise ValueError("golden_images need an encoder")
        for query in self.golden_queries:
            if len(query.leaves) != len(query.scores):
                raise ValueError(f"a golden query has {len(query.leaves)} leaves and {len(query.scores)} scores")
        embeddings = [query.embedding for query in self.golden_queries]
        embeddings += [image.embedding for image in self.golden_images]
        for embedding in embeddings:
            if len(decode_embedding(embedding)) != self.dimension:
                raise ValueError(f"a golden embedding does not have the dimension {self.dimension}")
        if MANIFEST_FILE in self.files:
            raise ValueError(f"{MANIFEST_FILE} cannot list itself")
        return self

    @property
    def needed_files(self) -> tuple[str, ...]:
        """Files that the manifest speaks of and that `files` must therefore list."""
        needed = [level.file for level in self.levels] + [TREE_FILE] + [image.file for image in self.golden_images]
        if self.encoder is not None:
            needed.append(f"{ENCODER_DIRECTORY}/config.json")
        if self.gallery is not None:
            needed += [self.gallery.file, self.gallery.coordinates_file]
        return tuple(needed)


def render_manifest(manifest: Manifest) -> tuple[Manifest, bytes]:
    """Seals a manifest with its own hash.

    Returns:
        The sealed manifest and the bytes of its file.
    """
    fields = manifest.model_dump(mode="json") | {"manifest_sha256": _UNSEALED}
    unsealed = (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
    digest = hashlib.sha256(unsealed).hexdigest()
    start, end = _self_check_span(unsealed)
    return manifest.model_copy(update={"manifest_sha256": digest}), unsealed[:start] + digest.encode() + unsealed[end:]


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Reads the bytes of a manifest.

    Args:
        data: Content of the file.
        where: Path to name in errors.

    Raises:
        BundleSchemaError: The manifest is of a schema that this engine does not read.
        BundleCorruptError: It is not a manifest, or was changed after it was written.
    """
    fields = _parse_json(data, where)
    version = fields.get("schema_version")
    if isinstance(version, int) and version not in READABLE_SCHEMA_VERSIONS:
        readable = ", ".join(map(str, READABLE_SCHEMA_VERSIONS))
        raise BundleSchemaError(
            f"{where} is of schema version {version}; this engine reads {readable}: "
            "use an engine that knows the version, or publish the bundle with this one"
        )
    try:
        start, end = _self_check_span(data)
    except ValueError as error:
        raise BundleCorruptError(f"{where} has no manifest_sha256; publish the bundle again") from error
    digest = hashlib.sha256(data[:start] + _UNSEALED.encode() + data[end:]).hexdigest()
    if digest != data[start:end].decode():
        raise BundleCorruptError(f"{where} was changed after it was written; publish the bundle again")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "manifest"
        raise BundleCorruptError(f"{where}: {field}: {first['msg']}") from error


def encode_embedding(embedding: ArrayLike) -> str:
    """Packs an embedding (d,) as base64 of little-endian float32."""
    return base64.b64encode(np.asarray(embedding, dtype="<f4").tobytes()).decode()


def decode_embedding(text: str) -> NDArray[np.float32]:
    """Unpacks what `encode_embedding` packed.

    Raises:
        ValueError: The text is not base64 of whole float32 values.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"an embedding is not base64: {error}") from error
    if len(data) % 4:
        raise ValueError(f"an embedding of {len(data)} bytes is not a row of float32")
    return np.frombuffer(data, "<f4").astype(np.float32)


def installed_library_versions() -> dict[str, str]:
    """Versions of the installed libraries that a bundle's content depends on."""
    installed = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    return {name: installed[name] for name in _LIBRARIES if name in installed}


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleCorruptError(f"{where} is not JSON: {error}; publish the bundle again") from error
    if not isinstance(fields, dict):
        raise BundleCorruptError(f"{where} is not a manifest; publish the bundle again")
    return fields


def _self_check_span(data: bytes) -> tuple[int, int]:
    found = list(_SELF_CHECK.finditer(data))
    if len(found) != 1:
        raise ValueError(f"{len(found)} self checks")
    return found[0].span(1)
