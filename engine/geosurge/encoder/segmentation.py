"""The semantic map: any transformers segmentation model, frozen, pooled to class fractions on the vision grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
)

from geosurge.encoder.backbones import backbone_config, load_pretrained, normalise_pixels
from geosurge.errors import EncoderError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# "the task is semantic" in OneFormer's CLIP vocabulary (start, the, task, is, seman-, -tic, end), zero-padded to 77.
# With the ids written down, no tokenizer file has to be found at run time.
ONEFORMER_TASK_TOKENS = (49406, 518, 10549, 533, 29119, 1550, 49407, *(0,) * 70)

# Transformers lists these beside the mask classifiers, but one labels only objects and the other wants videos.
_NOT_SEMANTIC = ("detr", "videomt")


@dataclass(frozen=True)
class SegmentationConfig:
    """Configuration of the segmenter.

    Attributes:
        backbone: Fields of the transformers configuration, `model_type` and the number of labels among them.
        image_size: Side of the square that the model sees, pixels.
        class_count: Number of semantic classes.
        mean: Channel means, 0 to 1.
        std: Channel standard deviations, 0 to 1.
        task_tokens: Token ids of the task text of task-conditioned models (OneFormer); `None` for all others.
    """

    backbone: Mapping[str, Any]
    image_size: int
    class_count: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    task_tokens: tuple[int, ...] | None = None

    @classmethod
    def oneformer_ade20k_swin_large(cls) -> Self:
        """OneFormer with a Swin-L backbone on ADE20K's 150 classes (`shi-labs/oneformer_ade20k_swin_large`)."""
        swin = {
            "model_type": "swin",
            "embed_dim": 192,
            "depths": [2, 2, 18, 2],
            "num_heads": [6, 12, 24, 48],
            "window_size": 12,
            "image_size": 384,
            "drop_path_rate": 0.3,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        }
        return cls(
            backbone={
                "model_type": "oneformer",
                "backbone_config": swin,
                "num_labels": 150,
                "num_queries": 250,
                "hidden_dim": 256,
                "conv_dim": 256,
                "mask_dim": 256,
                "encoder_feedforward_dim": 1024,
                "dim_feedforward": 2048,
                "encoder_layers": 6,
                "decoder_layers": 10,
                "is_training": False,
            },
            image_size=640,
            class_count=150,
            task_tokens=ONEFORMER_TASK_TOKENS,
        )


class Segmenter(nn.Module):
    """Runs a frozen segmentation model and pools its hard class map to a grid.

    The paper makes semantic tokens with "a linear layer" and says no more. OURS: the arg-max class map is one-hot
    encoded and average-pooled to the vision tower's patch grid: the fraction of each patch that each class covers.

    Attributes:
        config: The configuration.
        backbone: The transformers model, without the loss that it was trained with.
    """

    def __init__(self, config: SegmentationConfig, backbone: nn.Module | None = None) -> None:
        """Builds the segmenter, frozen and in evaluation mode.

        Args:
            config: The configuration.
            backbone: The model, where it is at hand already; otherwise it is built with random weights.

        Raises:
            EncoderError: The configuration is wrong, or the model has another number of classes.
        """
        super().__init__()
        self.config = config
        self.backbone = _build(config.backbone) if backbone is None else backbone
        # Mask classifiers carry their training loss, OneFormer's even with a float64 parameter of its own.
        if hasattr(self.backbone, "criterion"):
            del self.backbone.criterion
        labels = _class_count(self.backbone)
        if labels != config.class_count:
            raise EncoderError(
                f"segmentation model {config.backbone.get('model_type')!r} has {labels} classes, but class_count is "
                f"{config.class_count}"
            )
        self.requires_grad_(requires_grad=False)
        super().train(mode=False)
        if config.task_tokens is not None:
            self.register_buffer("task_tokens", torch.tensor(config.task_tokens), persistent=False)

    @classmethod
    def from_pretrained(cls, source: str, revision: str | None = None, *, image_size: int = 640) -> Self:
        """Loads a segmenter from a directory or a hub id and revision.

        Args:
            source: Local directory or hub id.
            revision: Commit of the hub repository.
            image_size: Side of the square that the model sees, pixels.

        Returns:
            The segmenter, with a configuration that rebuilds it without the source.

        Raises:
            EncoderError: A file is missing or damaged, or the model is no segmentation model.
        """
        # OneFormer's dropout and text towers follow this field and not the module's mode.
        pretrained = load_pretrained(_class_of, source, revision, overrides={"is_training": False})
        model_type = pretrained.settings["model_type"]
        config = SegmentationConfig(
            pretrained.settings,
            image_size,
            _class_count(pretrained.backbone),
            pretrained.mean or IMAGENET_MEAN,
            pretrained.std or IMAGENET_STD,
            ONEFORMER_TASK_TOKENS if model_type == "oneformer" else None,
        )
        return cls(config, pretrained.backbone)

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 - the signature is nn.Module's
        """Stays in evaluation mode: the segmenter is frozen."""
        return super().train(mode=False)

    def logits(self, pixels: Tensor) -> Tensor:
        """Scores of each class at each place of the model's own output map.

        Args:
            pixels: (n, 3, s, s) uint8.

        Returns:
            (n, classes, h, w) float: class logits, or for models that predict masks the summed mask probabilities.
        """
        inputs = normalise_pixels(pixels, self.config.image_size, self.config.mean, self.config.std)
        if self.config.task_tokens is not None:
            task_tokens = self.get_buffer("task_tokens")
            outputs = self.backbone(inputs, task_inputs=task_tokens.expand(inputs.shape[0], -1))
        else:
            outputs = self.backbone(inputs)
        if "class_queries_logits" not in outputs:
            scores: Tensor = outputs.logits
            return scores
        # Mask classification (MaskFormer, arXiv 2107.06278, eq. 4): marginalise the masks over the queries.
        classes = outputs.class_queries_logits.softmax(dim=-1)[..., :-1]
        masks = outputs.masks_queries_logits.sigmoid()
        return torch.einsum("nqc,nqhw->nchw", classes, masks)

    @torch.no_grad()
    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Class fractions of every patch.

        Args:
            pixels: (n, 3, s, s) uint8.
            grid: Rows and columns of the vision tower's patches.

        Returns:
            (n, rows * columns, classes) float32; each row sums to one.
        """
        labels = self.logits(pixels).argmax(dim=1)
        one_hot = F.one_hot(labels, self.config.class_count).movedim(-1, 1).to(torch.float32)
        return F.adaptive_avg_pool2d(one_hot, grid).flatten(2).transpose(1, 2)


def _build(settings: Mapping[str, Any]) -> nn.Module:
    """Builds a segmentation model with random weights."""
    config = backbone_config(settings)
    try:
        model: nn.Module = _class_of(config.model_type).from_config(config)
    except (RuntimeError, ValueError) as error:
        raise EncoderError(f"segmentation model {config.model_type!r} cannot be built: {error}") from error
    return model


def _class_count(backbone: Any) -> int:  # noqa: ANN401 - transformers is untyped
    return int(backbone.config.num_labels)


def _class_of(model_type: str) -> Any:  # noqa: ANN401 - transformers is untyped
    """Class to make a model with."""
    if model_type in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES and model_type not in _NOT_SEMANTIC:
        return AutoModelForUniversalSegmentation
    if model_type in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
        return AutoModelForSemanticSegmentation
    raise EncoderError(f"model_type {model_type!r} is not a semantic segmentation model known to transformers")
