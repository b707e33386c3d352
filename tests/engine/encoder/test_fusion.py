from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geosurge.encoder.fusion import Fusion, FusionBlock, FusionConfig, LatentCrossAttention, VisionHead
from geosurge.errors import EncoderError

Array = NDArray[np.float64]

CONFIG = FusionConfig(dimension=10, width=12, latent_width=8, heads=2, blocks=3, mlp_ratio=2.0)
VISION_WIDTH, TOKENS, CLASSES, CELLS = 7, 5, 4, 6


def fusion(config: FusionConfig = CONFIG, seed: int = 0) -> Fusion:
    torch.manual_seed(seed)
    module = Fusion(config, VISION_WIDTH, TOKENS, CLASSES, CELLS)
    # Away from their starting values, or half of the formula would go untested.
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return module.eval()


def inputs(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.randn(count, TOKENS, VISION_WIDTH, generator=generator)
    return rgb, torch.rand(count, CELLS, CLASSES, generator=generator).softmax(dim=-1)


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def linear(x: Array, layer: Any) -> Array:
    return x @ array(layer.weight).T + array(layer.bias)


def layer_norm(x: Array, layer: Any) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * array(layer.weight) + array(layer.bias)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def attention(queries: Array, context: Array, layer: LatentCrossAttention) -> tuple[Array, Array]:
    """Textbook multi-head attention, one image, head by head and query by query; also the weights."""
    query = linear(queries, layer.query)
    latent_width = query.shape[-1]
    key_value = linear(context, layer.key_value)
    key, value = key_value[:, :latent_width], key_value[:, latent_width:]
    size = latent_width // layer.heads
    attended = np.zeros_like(query)
    weights = np.zeros((layer.heads, len(queries), len(context)))
    for head in range(layer.heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(queries)):
            scores = np.exp(key[:, part] @ query[row, part] / math.sqrt(size))
            weights[head, row] = scores / scores.sum()
            attended[row, part] = weights[head, row] @ value[:, part]
    return linear(attended, layer.output), weights


def textbook(module: Fusion, rgb: Array, fractions: Array) -> tuple[Array, list[Array]]:
    """The whole module in float64, one image; also the attention weights of every block."""
    context = linear(rgb, module.vision_projection) + array(module.vision_position)
    semantic = linear(fractions, module.semantic_projection) + array(module.semantic_position)
    queries = np.concatenate([array(module.class_token)[None], semantic])
    every_weight = []
    for block in module.blocks:
        assert isinstance(block, FusionBlock)
        normalised = layer_norm(queries, block.query_norm)
        keys = np.concatenate([layer_norm(context, block.context_norm), normalised])
        update, weights = attention(normalised, keys, block.attention)
        every_weight.append(weights)
        queries = queries + update
        hidden = gelu(linear(layer_norm(queries, block.mlp_norm), block.mlp[0]))
        queries = queries + linear(hidden, block.mlp[2])
    v = linear(layer_norm(queries[0], module.norm), module.projection)
    if module.skip is not None:
        v = v + linear(layer_norm(rgb.mean(axis=0), module.skip.norm), module.skip.projection)
    return v / np.linalg.norm(v), every_weight


@pytest.mark.parametrize(("blocks", "vision_skip"), [(1, False), (2, False), (3, False), (3, True)])
def test_fusion_is_the_textbook_formula(blocks: int, vision_skip: bool) -> None:
    module = fusion(replace(CONFIG, blocks=blocks, vision_skip=vision_skip))
    assert (module.skip is not None) == vision_skip
    rgb, fractions = inputs(3)
    result = module(rgb, fractions)
    weights = module.attention_weights(rgb, fractions)
    assert result.dtype == torch.float32
    assert len(weights) == blocks
    for row in range(3):
        expected, expected_weights = textbook(module, array(rgb[row]), array(fractions[row]))
        np.testing.assert_allclose(array(result[row]), expected, atol=1e-5)
        for block in range(blocks):
            np.testing.assert_allclose(array(weights[block][row]), expected_weights[block], atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(1, 5),
    context=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_attention_is_the_textbook_formula(heads: int, queries: int, context: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = LatentCrossAttention(replace(CONFIG, heads=heads))
    query, keys = torch.randn(1, queries, CONFIG.width), torch.randn(1, context, CONFIG.width)
    expected, weights = attention(array(query[0]), array(keys[0]), layer)
    np.testing.assert_allclose(array(layer(query, keys)[0]), expected, atol=1e-5)
    np.testing.assert_allclose(array(layer.weights(query, keys)[0]), weights, atol=1e-6)


def test_attention_weights_cover_rgb_class_and_semantic_tokens_and_sum_to_one() -> None:
    for weights in fusion().attention_weights(*inputs(2)):
        assert weights.shape == (2, CONFIG.heads, 1 + CELLS, TOKENS + 1 + CELLS)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def test_embeddings_have_unit_length() -> None:
    v = fusion()(*inputs(5))
    assert v.shape == (5, CONFIG.dimension)
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(5))


@pytest.mark.parametrize("blocks", [1, 3])
def test_each_semantic_token_and_each_rgb_token_reaches_the_embedding(blocks: int) -> None:
    module = fusion(replace(CONFIG, blocks=blocks))
    rgb, fractions = (tensor.requires_grad_() for tensor in inputs(1))
    module(rgb, fractions)[0, 0].backward()
    assert rgb.grad is not None
    assert fractions.grad is not None
    assert (rgb.grad[0].abs().sum(dim=-1) > 0).all()
    assert (fractions.grad[0].abs().sum(dim=-1) > 0).all()


def test_another_semantic_map_is_another_embedding() -> None:
    module = fusion()
    rgb, fractions = inputs(1)
    changed = fractions.clone()
    changed[0, 2] = torch.eye(CLASSES)[1]
    assert (module(rgb, changed) - module(rgb, fractions)).norm() > 1e-3


def test_another_image_is_another_embedding() -> None:
    module = fusion()
    rgb, fractions = inputs(1)
    changed = rgb.clone()
    changed[0, 3] *= -1.0
    assert (module(changed, fractions) - module(rgb, fractions)).norm() > 1e-3


def test_layout_matters_and_not_only_content() -> None:
    module = fusion()
    rgb, fractions = inputs(1)
    assert (module(rgb.flip(1), fractions) - module(rgb, fractions)).norm() > 1e-3
    assert (module(rgb, fractions.flip(1)) - module(rgb, fractions)).norm() > 1e-3


def test_attention_happens_in_a_narrower_width() -> None:
    layer = LatentCrossAttention(FusionConfig())
    assert layer.query.weight.shape == (64, 128)
    assert layer.key_value.weight.shape == (128, 128)
    assert layer.output.weight.shape == (128, 64)
    query, key, value = layer._project(torch.randn(1, 3, 128), torch.randn(1, 5, 128))
    assert (query.shape, key.shape, value.shape) == ((1, 4, 3, 16), (1, 4, 5, 16), (1, 4, 5, 16))


def test_dropout_acts_only_while_training() -> None:
    module = fusion(replace(CONFIG, dropout=0.5))
    batch = inputs(2)
    assert torch.equal(module(*batch), module(*batch))
    module.train()
    assert not torch.equal(module(*batch), module(*batch))


def test_a_block_updates_the_first_queries_as_it_updates_all() -> None:
    torch.manual_seed(3)
    block = FusionBlock(CONFIG)
    queries, rgb = torch.randn(2, 4, CONFIG.width), torch.randn(2, 5, CONFIG.width)
    torch.testing.assert_close(block(queries, rgb, first=2), block(queries, rgb)[:, :2])


@pytest.mark.parametrize(("cells", "class_token"), [(TOKENS, False), (TOKENS - 1, True)])
def test_without_fusion_the_class_token_or_the_mean_of_all_tokens_is_embedded(cells: int, class_token: bool) -> None:
    torch.manual_seed(0)
    head = VisionHead(replace(CONFIG, blocks=0), VISION_WIDTH, TOKENS, cells)
    for parameter in head.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    rgb, _ = inputs(3)
    for row, embedding in enumerate(head(rgb)):
        tokens = array(rgb[row])
        v = linear(layer_norm(tokens[0] if class_token else tokens.mean(axis=0), head.norm), head.projection)
        np.testing.assert_allclose(array(embedding), v / np.linalg.norm(v), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"latent_width": 10, "heads": 4}, "latent_width 10 is not divisible by 4 heads"),
        ({"heads": 0}, "heads is 0"),
        ({"blocks": -1}, "blocks is -1; it must be at least 0"),
        ({"dimension": -1}, "dimension is -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio 0.0"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(EncoderError, match=reason):
        FusionConfig(**fields)
