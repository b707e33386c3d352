"""Recipes that train in seconds."""

from __future__ import annotations

from pathlib import Path

_RECIPE = """
name = "tiny-world"
seed = 3

[data]
{data}

[partition]
tau_min = 8
tau_max = [400, 120]

[encoder.vision]
image_size = 32
frozen = false

[encoder.vision.backbone]
model_type = "resnet"
layer_type = "basic"
embedding_size = 8
hidden_sizes = [8, 16]
depths = [1, 1]

[encoder.segmentation]
image_size = 32
class_count = 7
training_steps = {segmenter_steps}
training_batch_size = 8

[encoder.segmentation.backbone]
model_type = "segformer"
num_encoder_blocks = 2
depths = [1, 1]
sr_ratios = [2, 1]
hidden_sizes = [8, 8]
patch_sizes = [7, 3]
strides = [4, 2]
num_attention_heads = [1, 1]
mlp_ratios = [2, 2]
decoder_hidden_size = 8

[encoder.fusion]
dimension = 16
width = 16
latent_width = 8
heads = 2
blocks = 2

[training]
steps = {steps}
batch_size = 16
learning_rate = 3e-3
warmup_steps = 4
negatives = "{negatives}"
checkpoint_every = 5
log_every = 2

[calibration]
count = {calibration_count}
seed = 11

[bundle]
description = "A tiny world, for tests."
can = "nothing much"
cannot = "nearly everything"
storage = "fp16"
default_beam_width = 16
"""


def write_recipe(
    path: Path,
    *,
    data: str = 'source = "blue_marble"\npartition_samples = 4000',
    steps: int = 12,
    segmenter_steps: int = 3,
    calibration_count: int = 60,
    negatives: str = "all_cells",
) -> Path:
    """Writes a recipe for a world of 32-pixel views and two levels."""
    path.write_text(
        _RECIPE.format(
            data=data,
            steps=steps,
            segmenter_steps=segmenter_steps,
            calibration_count=calibration_count,
            negatives=negatives,
        )
    )
    return path
