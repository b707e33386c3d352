"""A training recipe: one TOML file that says everything about a bundle's making."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from geosurge.encoder import FusionConfig
from geosurge.encoder.backbones import unknown_fields
from geosurge.errors import ConfigurationError


class _Section(BaseModel):
    # Strict: TOML has types of its own, and "12" in quotes is a slip of the pen.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BlueMarbleData(_Section):
    """Views of the Blue Marble world, rendered on the fly."""

    source: Literal["blue_marble"]
    partition_samples: int = Field(1_000_000, ge=1000, description="Places that the partition is built from.")


class CsvData(_Section):
    """Images on disk, named by a CSV file with the columns `path`, `latitude_deg`, `longitude_deg`."""

    source: Literal["csv"]
    csv: Path = Field(description="The CSV file.")
    images: Path | None = Field(None, description="Folder that paths are relative to; default the CSV file's.")
    held_out_share: float = Field(0.05, gt=0, lt=1, description="Share of the images kept out of training.")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="Undecodable share of a batch above which fit stops.")


class PartitionSection(_Section):
    """Thresholds of the adaptive partition; see `geosurge_training.partition`."""

    tau_min: float | list[float] = Field(description="Cells need more samples than this, on all levels or each.")
    tau_max: list[float] = Field(min_length=1, description="Cells with more samples are split; one value a level.")
    start_s2_level: int = Field(2, ge=0, le=30)
    max_s2_level: int = Field(30, ge=0, le=30)

    @model_validator(mode="after")
    def _one_value_a_level(self) -> Self:
        if len(self.tau_min_per_level) != len(self.tau_max):
            raise ValueError(f"tau_min has {len(self.tau_min_per_level)} values and tau_max {len(self.tau_max)}")
        return self

    @property
    def tau_min_per_level(self) -> list[float]:
        """One `tau_min` a level."""
        return self.tau_min if isinstance(self.tau_min, list) else [self.tau_min] * len(self.tau_max)


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
    blocks: int = Field(3, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)

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
    """Optimisation: AdamW with warm-up and a cosine to zero."""

    steps: int = Field(gt=0)
    batch_size: int = Field(1024, gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(1e-4, ge=0)
    negatives: Literal["batch", "all_cells"] = "batch"
    initial_temperature: float = Field(0.07, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = Field(1000, gt=0)
    log_every: int = Field(50, gt=0)
    device: str = "cpu"


class CalibrationSection(_Section):
    """Held-out images that probabilities, radii and the point estimator are calibrated on."""

    count: int = Field(4000, gt=0)
    seed: int = Field(1, ge=0)


class BundleSection(_Section):
    """What the bundle says of itself and how it stores its vectors."""

    description: str
    can: str = Field(description="What the bundle can locate, in words.")
    cannot: str = Field(description="What it cannot.")
    storage: Literal["fp32", "fp16", "sq8"] = "fp32"
    default_beam_width: int = Field(32, gt=0, le=2048)


class Recipe(_Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: int = Field(0, ge=0)
    data: Annotated[BlueMarbleData | CsvData, Field(discriminator="source")]
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
    for key in ("csv", "images"):
        if isinstance(data.get(key), str):
            data[key] = folder / data[key]
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
    parts = [str(part) for part in location if part not in ("float", "list[float]")]
    if parts[0] == "data" and len(parts) > 2:
        del parts[1]
    return ".".join(parts)


def _reason(problem: ErrorDetails) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return "no such key"
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
