"""A training recipe: one TOML file that says everything about a bundle's making."""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails

from geosurge.bundle.manifest import BundleName, PointEstimator
from geosurge.encoder import FusionConfig
from geosurge.encoder.backbones import unknown_fields
from geosurge.errors import ConfigurationError

PartitionKind: TypeAlias = Literal["s2", "h3", "administrative"]
"""What cells are made of; the cells of administrative entities are of the kind `entity` in bundles."""

MIN_CALIBRATION_IMAGES: Final = 30
"""Held-out images that a bundle is calibrated on, at least."""


class _Section(BaseModel):
    # Strict: TOML has types of its own, and "12" in quotes is a slip of the pen.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BlueMarbleData(_Section):
    """Views of the Blue Marble world, rendered on the fly."""

    source: Literal["blue_marble"]
    partition_samples: int = Field(1_000_000, ge=1000, description="Places that the partition is built from.")


class StoredData(_Section):
    """What all images in files have in common."""

    columns: list[str] | None = Field(
        None,
        min_length=3,
        max_length=3,
        description="Headings of image, latitude and longitude in tables; default the known ones.",
    )
    held_out_share: float = Field(0.05, gt=0, lt=1, description="Share of the spots that are kept out of training.")
    held_out_table: Path | None = Field(None, description="Table that names the images kept out, instead of a share.")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="Share of images, rows or names that may be unusable.")


class TableData(StoredData):
    """Images in a folder, named by a CSV or Parquet table; see `geosurge_training.data.image_table`."""

    source: Literal["table"]
    table: Path = Field(description="CSV, or Parquet where the name ends in `.parquet`.")
    images: Path | None = Field(None, description="Folder that paths are relative to; default the table's.")


class WebDatasetData(StoredData):
    """Images in tar shards; see `geosurge_training.data.webdataset`."""

    source: Literal["webdataset"]
    shards: str | list[str] = Field(description="Paths, with `{000..127}`, `{a,b}`, `*`, `?` and `[...]`.")
    coordinates: Path | None = Field(None, description="Table of keys and coordinates; default each sample's JSON.")
    latitude_field: str = Field("latitude", description="Name of the latitude in the JSON.")
    longitude_field: str = Field("longitude", description="Name of the longitude in the JSON.")

    @property
    def shard_patterns(self) -> list[str]:
        """All the paths."""
        return [self.shards] if isinstance(self.shards, str) else self.shards


class _PartitionSection(_Section, ABC):
    tau_min: float | list[float] = Field(description="Cells need more samples than this, on all levels or each.")

    @model_validator(mode="after")
    def _one_value_a_level(self) -> Self:
        if len(self.tau_min_per_level) != self.level_count:
            raise ValueError(f"tau_min has {len(self.tau_min_per_level)} values for {self.level_count} levels")
        return self

    @property
    @abstractmethod
    def level_count(self) -> int:
        """Number of levels."""

    @property
    def tau_min_per_level(self) -> list[float]:
        """One `tau_min` a level."""
        return self.tau_min if isinstance(self.tau_min, list) else [self.tau_min] * self.level_count


class AdaptivePartitionSection(_PartitionSection):
    """Thresholds of the adaptive partitions; see `geosurge_training.partitions.adaptive`."""

    tau_max: list[float] = Field(min_length=1, description="Cells with more samples are split; one value a level.")

    @property
    def level_count(self) -> int:
        """Number of levels."""
        return len(self.tau_max)


class S2PartitionSection(AdaptivePartitionSection):
    """S2 cells."""

    kind: Literal["s2"] = "s2"
    start_s2_level: int = Field(2, ge=0, le=30)
    max_s2_level: int = Field(30, ge=0, le=30)


class H3PartitionSection(AdaptivePartitionSection):
    """H3 cells."""

    kind: Literal["h3"]
    start_h3_resolution: int = Field(0, ge=0, le=15)
    max_h3_resolution: int = Field(15, ge=0, le=15)


class AdministrativePartitionSection(_PartitionSection):
    """Countries, regions, subregions and cities; see `geosurge_training.partitions.entities`."""

    kind: Literal["administrative"]

    @property
    def level_count(self) -> int:
        """Number of levels."""
        return 4


def _partition_kind(section: object) -> object:
    return section.get("kind", "s2") if isinstance(section, dict) else getattr(section, "kind", None)


PartitionSection: TypeAlias = Annotated[
    Annotated[S2PartitionSection, Tag("s2")]
    | Annotated[H3PartitionSection, Tag("h3")]
    | Annotated[AdministrativePartitionSection, Tag("administrative")],
    Discriminator(
        _partition_kind,
        custom_error_type="partition_kind",
        custom_error_message='`kind` must be "s2", "h3" or "administrative"',
    ),
]
"""Which cells there are; each kind has its own keys."""


class TowerSection(_Section):
    """A transformers backbone: pretrained, or from a configuration with random weights.

    Colour statistics are those that a pretrained backbone was trained with, where its files say so.
    """

    pretrained: str | None = Field(None, description="Local directory, or hub id (then `revision` is required).")
    revision: str | None = Field(None, description="Commit of the hub repository.")
    backbone: dict[str, Any] | None = Field(None, description="Transformers configuration, `model_type` included.")
    image_size: int = Field(gt=0, description="Side of the square that the tower sees, pixels.")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.pretrained is None) == (self.backbone is None):
            raise ValueError("give exactly one of `pretrained` and `backbone`")
        for field in unknown_fields(self.backbone or {}):
            raise ValueError(f"backbone.{field}: no such field of a transformers configuration of this model_type")
        return self


class VisionSection(TowerSection):
    """The vision tower."""

    frozen: bool = True


class SegmentationSection(TowerSection):
    """The segmenter; with `training_steps` it is trained first, on the data source's own classes."""

    class_count: int = Field(gt=1)
    training_steps: int = Field(0, ge=0)
    training_batch_size: int = Field(128, gt=0)
    training_learning_rate: float = Field(2e-3, gt=0)


class FusionSection(_Section):
    """Sizes of the fusion module; see `geosurge.encoder.FusionConfig`."""

    dimension: int = Field(768, gt=0)
    width: int = Field(128, gt=0)
    latent_width: int = Field(64, gt=0)
    heads: int = Field(4, gt=0)
    blocks: int = Field(3, ge=0, description="0: no fusion, and the segmenter is neither trained nor run.")
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    vision_skip: bool = Field(False, description="Add the vision tower's own embedding to the fused one.")

    def config(self) -> FusionConfig:
        """The engine's form of the section."""
        return FusionConfig(**self.model_dump())


class EncoderSection(_Section):
    """The fusion encoder."""

    vision: VisionSection
    segmentation: SegmentationSection
    fusion: FusionSection = FusionSection()
    weight_dtype: Literal["float32", "float16"] = "float32"


class TrainingSection(_Section):
    """Optimisation: AdamW with warm-up, for steps or epochs; see `geosurge_training.fitting.schedule`."""

    steps: int | None = Field(None, gt=0, description="Length of the run; or give `epochs`.")
    epochs: int | None = Field(None, gt=0, description="Length of the run, where the data source has epochs.")
    batch_size: int = Field(1024, gt=0, description="Images a step, of all devices together.")
    micro_batch_size: int | None = Field(None, gt=0, description="Images that a device encodes at once; default all.")
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["cosine", "halving"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(1e-4, ge=0)
    patience: int | None = Field(None, gt=0, description="Epochs without gain on the held-out loss that end the run.")
    patience_images: int = Field(4096, gt=0, description="Held-out images that this loss is taken on, at most.")
    negatives: Literal["batch", "all_cells"] = "batch"
    head: Literal["embeddings", "classifier"] = "embeddings"
    initial_temperature: float = Field(0.07, gt=0)
    label_smoothing_km: float = Field(0.0, ge=0, description="Reach of soft targets; 0 for hard ones.")
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = Field(1000, gt=0)
    log_every: int = Field(50, gt=0)
    device: str = "cpu"
    devices: int = Field(1, gt=0, description="Devices of this kind that share each batch, a process for each.")
    tower_cache: Path | None = Field(None, description="Folder that outputs of frozen towers are kept in.")
    tower_cache_dtype: Literal["float16", "float32"] = "float16"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        if self.batch_size % self.devices:
            raise ValueError(f"batch_size {self.batch_size} cannot be shared by {self.devices} devices evenly")
        if self.head == "classifier" and self.negatives != "all_cells":
            raise ValueError('head = "classifier" has every cell as a class; it needs negatives = "all_cells"')
        return self

    @property
    def images_at_once(self) -> int:
        """Images that a device encodes at once."""
        share = self.batch_size // self.devices
        return share if self.micro_batch_size is None else min(share, self.micro_batch_size)


class CalibrationSection(_Section):
    """Held-out images that probabilities, radii and the point estimator are calibrated on."""

    count: int = Field(4000, ge=MIN_CALIBRATION_IMAGES)
    seed: int = Field(1, ge=0)
    point_estimator: PointEstimator | None = Field(None, description="What makes the point; default what is best.")


class BundleSection(_Section):
    """What the bundle says of itself and how it stores its vectors."""

    description: str
    can: str = Field(description="What the bundle can locate, in words.")
    cannot: str = Field(description="What it cannot.")
    storage: Literal["fp32", "fp16", "sq8"] = "fp32"
    default_beam_width: int = Field(32, gt=0, le=2048)
    gallery_size: int = Field(0, ge=0, description="Training images whose embeddings place queries inside leaves.")


class Recipe(_Section):
    """A whole recipe."""

    name: BundleName
    seed: int = Field(0, ge=0)
    data: Annotated[BlueMarbleData | TableData | WebDatasetData, Field(discriminator="source")]
    partition: PartitionSection
    encoder: EncoderSection
    training: TrainingSection
    calibration: CalibrationSection = CalibrationSection()
    bundle: BundleSection


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Args:
        path: The TOML file.

    Returns:
        The recipe; relative paths in it are taken from the file's own folder.

    Raises:
        ConfigurationError: The file is missing, is not TOML, or holds an unknown key or a wrong value. All of them are
            named at once.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"recipe {path} is not TOML: {error}") from error
    _resolve_paths(fields, path.parent)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        problems = dict.fromkeys(f"{_key(problem['loc'])}: {_reason(problem)}" for problem in error.errors())
        raise ConfigurationError(f"recipe {path}: {'; '.join(problems)}") from error


def _resolve_paths(fields: dict[str, Any], folder: Path) -> None:
    """Takes relative paths from the recipe's folder; what is no directory there may still be a hub id."""
    data = _table(fields, "data")
    for key in ("table", "images", "held_out_table", "coordinates"):
        if isinstance(data.get(key), str):
            data[key] = folder / data[key]
    match data.get("shards"):
        case str(pattern):
            data["shards"] = str(folder / pattern)
        case [*patterns] if all(isinstance(pattern, str) for pattern in patterns):
            data["shards"] = [str(folder / pattern) for pattern in patterns]
    training = _table(fields, "training")
    if isinstance(training.get("tower_cache"), str):
        training["tower_cache"] = folder / training["tower_cache"]
    for tower in ("vision", "segmentation"):
        section = _table(_table(fields, "encoder"), tower)
        pretrained = section.get("pretrained")
        if isinstance(pretrained, str) and (folder / pretrained).is_dir():
            section["pretrained"] = str(folder / pretrained)


def _table(fields: dict[str, Any], key: str) -> dict[str, Any]:
    value = fields.get(key)
    return value if isinstance(value, dict) else {}


def _key(location: tuple[int | str, ...]) -> str:
    """Dotted key as it stands in the file, without pydantic's names of the members of a union."""
    parts = [str(part) for part in location if part not in ("float", "list[float]", "str", "list[str]")]
    if (parts[0] == "data" and len(parts) > 2) or (parts[0] == "partition" and len(parts) > 1):
        del parts[1]
    return ".".join(parts)


def _reason(problem: ErrorDetails) -> str:
    match problem["type"]:
        case "extra_forbidden":
            section, kind = (*problem["loc"], "")[:2]
            return f'no such key with kind = "{kind}"' if section == "partition" else "no such key"
        case "missing":
            return "missing"
        case "union_tag_not_found":
            return "the key `source` is missing"
        case "is_instance_of":
            return "must be a path in quotes"
        case "value_error":
            return problem["msg"].removeprefix("Value error, ")
        case _:
            return problem["msg"]
