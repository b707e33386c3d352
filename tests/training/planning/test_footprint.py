"""Counts of operations and bytes against formulas written out by hand, and against real runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.backbones import CLASS_COUNT, CLIP, MASK2FORMER, ONEFORMER, RESNET, SEGFORMER
from torch import nn

from geosurge.encoder import EncoderConfig, FusionConfig, ImageEncoder, SegmentationConfig, VisionConfig
from geosurge.encoder.segmentation import ONEFORMER_TASK_TOKENS
from geosurge_training.planning.footprint import footprint, hollow, weightless

FLOAT = 4


def tiny(vision: dict[str, object], segmenter: dict[str, object]) -> ImageEncoder:
    tokens = ONEFORMER_TASK_TOKENS if segmenter is ONEFORMER else None
    return ImageEncoder(
        EncoderConfig(
            VisionConfig(vision, 32),
            SegmentationConfig(segmenter, 64, CLASS_COUNT, task_tokens=tokens),
            FusionConfig(dimension=24, width=16, latent_width=8, heads=2, blocks=2),
        )
    )


def test_a_linear_layer_is_two_operations_a_weight_and_row_and_its_backward_twice_that() -> None:
    with weightless():
        layer = hollow(lambda: nn.Linear(300, 200))
        rows = torch.empty(7, 300, requires_grad=True)
        forward = footprint(lambda: layer(rows))
        trained = footprint(lambda: layer(rows).sum().backward())
    assert forward.flops == 2 * 7 * 300 * 200
    assert trained.flops == 3 * forward.flops
    assert forward.peak_bytes == 7 * 200 * FLOAT


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_two_matrix_products_and_fused_keeps_no_scores(fused: bool) -> None:
    heads, queries, keys, width = 4, 50, 80, 16
    with weightless():
        q, k, v = (torch.empty(1, heads, count, width) for count in (queries, keys, keys))
        if fused:
            cost = footprint(lambda: F.scaled_dot_product_attention(q, k, v))
        else:
            cost = footprint(lambda: (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v)
    assert cost.flops == 2 * 2 * heads * queries * keys * width
    scores, output = heads * queries * keys * FLOAT, heads * queries * width * FLOAT
    if fused:
        assert output <= cost.peak_bytes < output + scores
    else:
        assert cost.peak_bytes == 2 * scores


def test_training_through_fused_attention_computes_the_scores_again() -> None:
    product = 2 * 4 * 50 * 80 * 16
    with weightless():
        q, k, v = (torch.empty(1, 4, count, 16, requires_grad=True) for count in (50, 80, 80))
        cost = footprint(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    forward, gradients, scores = 2 * product, 4 * product, product
    assert cost.flops == forward + gradients + scores


def test_a_convolution_is_two_operations_a_weight_and_output_place() -> None:
    with weightless():
        layer = hollow(lambda: nn.Conv2d(3, 8, kernel_size=5, stride=5))
        images = torch.empty(2, 3, 20, 30)
        cost = footprint(lambda: layer(images))
    assert cost.flops == 2 * (3 * 5 * 5) * 8 * (4 * 6) * 2


def test_memory_is_what_is_alive_at_once_and_not_what_was_ever_made() -> None:
    with weightless():
        start = torch.empty(1000)

        def chain() -> torch.Tensor:
            rows = start
            for _ in range(50):
                rows = rows + 1
            return rows

        def kept() -> list[torch.Tensor]:
            return [start + 1 for _ in range(50)]

        assert footprint(chain).peak_bytes == 2 * 1000 * FLOAT
        assert footprint(kept).peak_bytes == 50 * 1000 * FLOAT
        assert footprint(lambda: start.view(10, 100).add_(1)).peak_bytes == 0


def test_what_a_backward_pass_needs_is_kept_and_reduced_precision_halves_it() -> None:
    with weightless():
        layers = hollow(lambda: nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8))))
        rows = torch.empty(512, 64)
        with torch.no_grad():
            forward = footprint(lambda: layers(rows)).peak_bytes
        trained = footprint(lambda: layers(rows).sum().backward()).peak_bytes
        with torch.autocast("cpu", torch.bfloat16):
            reduced = footprint(lambda: layers(rows).sum().backward()).peak_bytes
    activation = 512 * 64 * FLOAT
    assert forward <= 3 * activation
    # Each layer keeps the input of its linear part and that of its activation.
    assert 16 * activation <= trained <= 20 * activation
    assert reduced < 0.7 * trained


@pytest.mark.parametrize(
    ("vision", "segmenter"),
    [(CLIP, ONEFORMER), (RESNET, SEGFORMER), (CLIP, MASK2FORMER)],
    ids=lambda s: s["model_type"],
)
def test_an_encoder_without_weights_costs_what_a_real_one_does(
    vision: dict[str, object], segmenter: dict[str, object]
) -> None:
    real = tiny(vision, segmenter)
    pixels = torch.randint(0, 256, (2, 3, real.image_size, real.image_size), dtype=torch.uint8)
    with torch.no_grad():
        done = footprint(lambda: real(pixels))
        with weightless():
            empty = hollow(lambda: tiny(vision, segmenter))
            no_pixels = torch.empty(pixels.shape, dtype=torch.uint8)
            foretold = footprint(lambda: empty(no_pixels))
    assert empty.parameter_counts() == real.parameter_counts()
    assert foretold.flops == done.flops > 0
    assert foretold.peak_bytes == pytest.approx(done.peak_bytes, rel=0.02)


def test_the_full_size_needs_no_memory_and_has_the_published_size_and_cost() -> None:
    # OpenAI's ViT-L/14 is published as 304 million parameters; at 336 pixels it has 320 more position embeddings.
    published_parameters = 304e6
    layers, width, tokens, patches = 24, 1024, 577, 576
    projections = layers * 12 * width * width * tokens
    attention = layers * 2 * tokens * tokens * width
    with weightless(), torch.no_grad():
        encoder = hollow(lambda: ImageEncoder(EncoderConfig.full_size()))
        pixels = torch.empty(1, 3, 640, 640, dtype=torch.uint8)
        cost = footprint(lambda: encoder.vision(pixels))
    assert encoder.parameter_counts()["vision"] == pytest.approx(published_parameters, rel=0.005)
    assert cost.flops == 2 * (projections + attention + patches * 3 * 14 * 14 * width)
