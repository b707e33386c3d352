"""Transformers backbones from configuration or from pretrained files, and what both towers do to their pixels.

Nothing here downloads silently: a pretrained backbone is a local directory, or a hub id together with a revision, and a
file that is not at hand is an `EncoderError` that names it and says how to get it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.image_processing_auto import get_image_processor_config

from geosurge.errors import EncoderError

# Of a pretrained model's configuration these tell how its file was made, not what the model is; a stored `dtype` would
# even rebuild it in another precision than the one it is computed in.
_PROVENANCE_FIELDS = ("architectures", "dtype", "transformers_version")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained backbone.

    Attributes:
        backbone: The model in float32 and evaluation mode.
        settings: Fields that `backbone_config` rebuilds its configuration from; plain JSON.
        mean: Channel means that it was trained with, 0 to 1; `None` where its files do not say.
        std: Channel standard deviations, likewise.
    """

    backbone: nn.Module
    settings: dict[str, Any]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def backbone_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """Builds a transformers configuration.

    Args:
        settings: Fields of the configuration, `model_type` among them.

    Returns:
        The configuration object of that model type.

    Raises:
        EncoderError: `model_type` is missing or unknown to the installed transformers, or a field has a wrong value.
    """
    fields = dict(settings)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise EncoderError("a backbone needs a `model_type`, for example 'clip_vision_model' or 'resnet'")
    if model_type not in CONFIG_MAPPING:
        raise EncoderError(f"backbone model_type {model_type!r} is not known to the installed transformers")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise EncoderError(f"backbone {model_type!r} cannot be configured: {error}") from error


def unknown_fields(settings: Mapping[str, Any]) -> list[str]:
    """Names of the settings that the model type does not know, nested configurations included.

    Transformers keeps such a field as an attribute that nothing reads, so that a misspelt one would go unnoticed.

    Args:
        settings: Fields of a transformers configuration.

    Returns:
        Dotted names, sorted; empty where `model_type` itself is missing or unknown, which `backbone_config` reports.
    """
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return []
    default = AutoConfig.for_model(model_type)
    unknown = [key for key in settings if not hasattr(default, key)]
    for key, value in settings.items():
        if isinstance(value, Mapping):
            unknown += [f"{key}.{name}" for name in unknown_fields(value)]
    return sorted(unknown)


def load_pretrained(
    choose_class: Callable[[str], Any], source: str, revision: str | None, overrides: Mapping[str, Any] | None = None
) -> Pretrained:
    """Loads a pretrained backbone from a directory or from an explicit hub id and revision.

    Args:
        choose_class: Gives the transformers class to load with for a `model_type`.
        source: Local directory, or hub id such as `openai/clip-vit-large-patch14-336`.
        revision: Commit of the hub repository; required unless `source` is a directory.
        overrides: Fields of the configuration that are set whatever the files say; only those the model type knows.

    Returns:
        The backbone and what its files say about it.

    Raises:
        EncoderError: The source is a hub id without a revision, a file is missing or damaged, or the weights do not
            cover the whole model.
    """
    if not Path(source).is_dir() and revision is None:
        raise EncoderError(
            f"backbone {source!r} is not a local directory; to load it from the hub give its `revision` (a commit), "
            "so that a rebuilt encoder is the same encoder"
        )
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        known = {key: value for key, value in (overrides or {}).items() if hasattr(config, key)}
        backbone, report = choose_class(config.model_type).from_pretrained(
            source,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **known,
        )
        statistics = get_image_processor_config(source, revision=revision)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = str(error).rstrip(".")
        raise EncoderError(f"backbone {source!r} cannot be loaded: {reason}. {_remedy(source, revision)}") from error
    _check_weights(report, config.model_type, source)
    mean, std = (_per_channel(statistics.get(key)) for key in ("image_mean", "image_std"))
    return Pretrained(backbone.eval(), _settings(backbone.config), mean, std)


def read_settings(source: str, revision: str | None) -> dict[str, Any] | None:
    """Reads what a pretrained backbone is, without its weights and without a network.

    Args:
        source: Local directory, or hub id.
        revision: Commit of the hub repository.

    Returns:
        Fields that `backbone_config` builds its configuration from; None where a hub id has no `config.json` in the
        hub's local cache.

    Raises:
        EncoderError: A directory has no `config.json`, or it is damaged.
    """
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, StrictDataclassError) as error:
        if not Path(source).is_dir():
            return None
        reason = str(error).rstrip(".")
        raise EncoderError(f"backbone {source!r} cannot be read: {reason}. {_remedy(source, revision)}") from error
    return _settings(config)


def normalise_pixels(pixels: Tensor, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Brings canonical pixels to a tower's size and colour statistics.

    Args:
        pixels: (n, 3, s, s) uint8, or float already in 0 to 255.
        image_size: Side that the tower wants; antialiased bicubic where it differs from `s`.
        mean: Mean of each channel, in units of 0 to 1.
        std: Standard deviation of each channel, in units of 0 to 1.

    Returns:
        (n, 3, image_size, image_size) float32.
    """
    scaled = pixels.to(torch.float32) / 255.0
    if scaled.shape[-1] != image_size:
        size = (image_size, image_size)
        scaled = F.interpolate(scaled, size=size, mode="bicubic", antialias=True, align_corners=False)
    shape = (1, -1, 1, 1)
    return (scaled - scaled.new_tensor(mean).view(shape)) / scaled.new_tensor(std).view(shape)


def _check_weights(report: Mapping[str, Any], model_type: str, source: str) -> None:
    """Refuses what transformers only reports: weights that a file lacks stay random."""
    for name, found, wanted in report["mismatched_keys"]:
        raise EncoderError(
            f"backbone {source!r}: {name} is of shape {tuple(found)} in its file, but {tuple(wanted)} in the "
            f"{model_type!r} model that its config.json describes; the two files do not belong together"
        )
    # Counters of batches change no output, and nor does the loss that a model was trained with.
    missing = sorted(
        name
        for name in report["missing_keys"]
        if not name.startswith("criterion.") and not name.endswith("num_batches_tracked")
    )
    if missing:
        raise EncoderError(
            f"backbone {source!r} lacks {len(missing)} of the weights of a {model_type!r} model ({missing[0]}, ...); "
            "they would be random numbers. It is a model of another kind, or its config.json is another model's"
        )


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    """The configuration as plain JSON, so that it is the same before and after it was stored."""
    fields = json.loads(json.dumps(config.to_diff_dict()))
    kept = {key: value for key, value in fields.items() if not key.startswith("_") and key not in _PROVENANCE_FIELDS}
    return {**kept, "model_type": config.model_type}


def _per_channel(values: Any) -> tuple[float, ...] | None:  # noqa: ANN401 - parsed JSON
    if not isinstance(values, list) or len(values) != 3:
        return None
    return tuple(float(value) for value in values)


def _remedy(source: str, revision: str | None) -> str:
    if Path(source).is_dir():
        return (
            "The directory must hold config.json and safetensors weights, as `save_pretrained` writes them; weights in "
            "other formats are never read."
        )
    return (
        f"Fetch it where there is a network with `hf download {source} --revision {revision} --local-dir DIR` and give "
        "DIR instead; if it has no safetensors weights, load it there once and write them with `save_pretrained`."
    )
