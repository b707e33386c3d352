"""Transformers configurations small enough to build in milliseconds."""

from __future__ import annotations

from typing import Any, Final

Settings = dict[str, Any]

CLASS_COUNT: Final = 12

CLIP: Final[Settings] = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}
DINO: Final[Settings] = {
    "model_type": "dinov3_vit",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_register_tokens": 3,
    "patch_size": 8,
    "image_size": 32,
}
RESNET: Final[Settings] = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
}
CONVNEXT: Final[Settings] = {"model_type": "convnext", "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
SWIN: Final[Settings] = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 1, 1],
    "window_size": 2,
    "patch_size": 4,
    "image_size": 32,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
SEGFORMER: Final[Settings] = {
    "model_type": "segformer",
    "num_labels": CLASS_COUNT,
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 8],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 1],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
}
# The group norms of the pixel decoders need 32 channels.
ONEFORMER: Final[Settings] = {
    "model_type": "oneformer",
    "backbone_config": SWIN,
    "num_labels": CLASS_COUNT,
    "num_queries": 6,
    "hidden_dim": 32,
    "conv_dim": 32,
    "mask_dim": 32,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "is_training": False,
}
MASK2FORMER: Final[Settings] = {
    "model_type": "mask2former",
    "backbone_config": SWIN,
    "num_labels": CLASS_COUNT,
    "num_queries": 6,
    "hidden_dim": 32,
    "feature_size": 32,
    "mask_feature_size": 32,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
}
