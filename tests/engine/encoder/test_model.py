from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from support.backbones import CLASS_COUNT, CLIP, ONEFORMER, RESNET, SEGFORMER, Settings

from geosurge.encoder import EncoderConfig, FusionConfig, ImageEncoder, SegmentationConfig, VisionConfig, model
from geosurge.encoder.segmentation import ONEFORMER_TASK_TOKENS, Segmenter
from geosurge.encoder.vision import VisionTower
from geosurge.errors import EncoderError
from geosurge.preprocessing import Preprocessing

FUSION = FusionConfig(dimension=12, width=16, latent_width=8, heads=2, blocks=2)
SIDE = 32


def make_config(vision: Settings = RESNET, segmentation: Settings = SEGFORMER, **fields: Any) -> EncoderConfig:
    tokens = ONEFORMER_TASK_TOKENS if segmentation["model_type"] == "oneformer" else None
    side = 64 if tokens else SIDE
    return EncoderConfig(
        VisionConfig(vision, SIDE),
        SegmentationConfig(segmentation, side, CLASS_COUNT, task_tokens=tokens),
        FUSION,
        **fields,
    )


def make_encoder(config: EncoderConfig | None = None, seed: int = 0) -> ImageEncoder:
    torch.manual_seed(seed)
    return ImageEncoder(config or make_config())


def random_pixels(count: int, side: int = SIDE, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), np.uint8)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return make_encoder()


@pytest.fixture
def saved(encoder: ImageEncoder, tmp_path: Path) -> Path:
    encoder.save(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_the_canonical_size_is_the_larger_towers() -> None:
    config = make_config()
    larger = replace(config, segmentation=replace(config.segmentation, image_size=48))
    built = make_encoder(larger)
    assert built.image_size == 48
    assert built.preprocessing == Preprocessing(48)
    assert built.encode(random_pixels(1, 48)).shape == (1, FUSION.dimension)


def test_embeddings_are_unit_rows_whatever_the_batch(encoder: ImageEncoder) -> None:
    pixels = random_pixels(5)
    together = encoder.encode(pixels)
    assert together.dtype == np.float32
    assert together.shape == (5, encoder.dimension)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    for row in range(5):
        np.testing.assert_allclose(encoder.encode(pixels[row : row + 1])[0], together[row], atol=1e-5)
    assert encoder.encode(pixels[:0]).shape == (0, encoder.dimension)
    assert encoder.encode(pixels[:0]).dtype == np.float32


def test_a_large_encoder_on_the_cpu_computes_what_keeps_its_threads_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_encoder()
    monkeypatch.setattr(model, "MAX_PARAMETERS", 0)
    large = make_encoder()
    monkeypatch.setattr(model, "_TOKENS_A_THREAD", large.vision.token_count)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert small.useful_batch_size(1000) == 1000
    assert [large.useful_batch_size(limit) for limit in (1, 2, 3, 4, 1000)] == [1, 2, 3, 3, 3]
    monkeypatch.setattr(model, "_TOKENS_A_THREAD", 1)
    assert large.useful_batch_size(1000) == 1
    assert large.to("meta").useful_batch_size(1000) == 1000, "not on the CPU"


def test_parts_of_a_batch_are_embedded_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, sizes = random_pixels(7), []
    encoder = make_encoder()
    together = encoder.encode(pixels)
    monkeypatch.setattr(encoder, "useful_batch_size", lambda limit: min(limit, 3))
    with encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))):
        parts = encoder.encode(pixels)
    assert sizes == [3, 3, 1]
    np.testing.assert_allclose(parts, together, atol=1e-5)


@pytest.mark.parametrize("vision", [RESNET, CLIP], ids=["resnet", "clip"])
def test_an_encoder_without_fusion_never_runs_its_segmenter_and_survives_saving(
    vision: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_encoder(replace(make_config(vision), fusion=replace(FUSION, blocks=0)))
    monkeypatch.setattr(plain.segmenter, "forward", None)
    embeddings = plain.encode(random_pixels(3))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-6)
    assert plain.attention_weights(random_pixels(1)) == []
    plain.save(tmp_path)
    loaded = ImageEncoder.load(tmp_path)
    assert loaded.fingerprint == plain.fingerprint
    np.testing.assert_allclose(loaded.encode(random_pixels(3)), embeddings, atol=1e-5)


def test_towers_and_fusion_are_the_whole_encoder(encoder: ImageEncoder) -> None:
    pixels = torch.from_numpy(random_pixels(3))
    seen = encoder.towers(pixels)
    assert not seen.tokens.requires_grad
    assert torch.equal(encoder.fuse(seen), encoder(pixels))


def test_encoding_leaves_the_encoder_as_it_was(encoder: ImageEncoder) -> None:
    before = encoder.fingerprint
    encoder.encode(random_pixels(4))
    assert encoder.fingerprint == before


def test_reversed_and_read_only_pixels_are_encoded_alike(encoder: ImageEncoder) -> None:
    pixels = random_pixels(3)
    expected = encoder.encode(pixels)
    np.testing.assert_allclose(encoder.encode(pixels[::-1])[::-1], expected, atol=1e-6)
    pixels.flags.writeable = False
    assert np.array_equal(encoder.encode(pixels), expected)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((3, SIDE, SIDE), np.uint8),
        np.zeros((1, SIDE, SIDE, 3), np.uint8),
        np.zeros((1, 3, SIDE, SIDE + 1), np.uint8),
        np.zeros((1, 1, SIDE, SIDE), np.uint8),
        np.zeros((1, 3, SIDE, SIDE), np.float32),
    ],
)
def test_pixels_of_a_wrong_shape_or_type_are_refused(encoder: ImageEncoder, pixels: NDArray[Any]) -> None:
    for method in (encoder.encode, encoder.attention_weights):
        with pytest.raises(ValueError, match=r"pixels must be \(n, 3, 32, 32\) uint8, not"):
            method(pixels)


def test_an_encoder_is_built_for_evaluation_and_does_not_encode_while_training() -> None:
    built = make_encoder(replace(make_config(), vision=VisionConfig(RESNET, SIDE, frozen=False)))
    assert not any(module.training for module in built.modules())
    built.train()
    assert built.vision.backbone.training
    assert not any(module.training for module in built.segmenter.modules())
    with pytest.raises(RuntimeError, match="training mode"):
        built.encode(random_pixels(2))


def test_only_fusion_learns_where_the_vision_tower_is_frozen(encoder: ImageEncoder) -> None:
    trained = {name.split(".")[0] for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {"fusion"}


def test_attention_weights_come_for_every_block(encoder: ImageEncoder) -> None:
    cells = encoder.vision.grid[0] * encoder.vision.grid[1]
    weights = encoder.attention_weights(random_pixels(2))
    assert len(weights) == FUSION.blocks
    for block in weights:
        assert block.shape == (2, FUSION.heads, 1 + cells, encoder.vision.token_count + 1 + cells)
        np.testing.assert_allclose(block.sum(axis=-1), 1.0, atol=1e-5)


def test_parameters_are_counted_by_part(encoder: ImageEncoder) -> None:
    counts = encoder.parameter_counts()
    assert list(counts) == ["vision", "segmentation", "fusion"]
    assert sum(counts.values()) == sum(parameter.numel() for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("vision", "segmentation"), [(RESNET, SEGFORMER), (CLIP, ONEFORMER)], ids=["convolutions", "transformers"]
)
def test_a_saved_encoder_comes_back_bit_for_bit(vision: Settings, segmentation: Settings, tmp_path: Path) -> None:
    original = make_encoder(make_config(vision, segmentation))
    original.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = ImageEncoder.load(tmp_path)
    assert not loaded.training
    assert loaded.fingerprint == original.fingerprint
    assert EncoderConfig.from_dict(asdict(loaded.config)) == loaded.config
    state = loaded.state_dict()
    assert all(torch.equal(values, state[name]) for name, values in original.state_dict().items())
    pixels = random_pixels(2, original.image_size)
    assert np.array_equal(loaded.encode(pixels), original.encode(pixels))


def test_an_encoder_of_pretrained_towers_keeps_its_fingerprint(tmp_path: Path) -> None:
    # Twelve labelled classes: as JSON keys, their numbers sort otherwise than as numbers.
    Segmenter(SegmentationConfig(SEGFORMER, SIDE, CLASS_COUNT)).backbone.save_pretrained(tmp_path / "segmentation")
    VisionTower(VisionConfig(CLIP, SIDE)).backbone.save_pretrained(tmp_path / "vision")
    vision = VisionTower.from_pretrained(str(tmp_path / "vision"))
    segmenter = Segmenter.from_pretrained(str(tmp_path / "segmentation"), image_size=SIDE)
    original = ImageEncoder(EncoderConfig(vision.config, segmenter.config, FUSION), vision, segmenter)
    original.save(tmp_path / "encoder")
    for source in ("vision", "segmentation"):
        shutil.rmtree(tmp_path / source)
    loaded = ImageEncoder.load(tmp_path / "encoder")
    assert loaded.fingerprint == original.fingerprint
    assert np.array_equal(loaded.encode(random_pixels(2)), original.encode(random_pixels(2)))


def test_a_fingerprint_does_not_depend_on_how_label_numbers_are_written() -> None:
    labels = {number: f"class {number}" for number in range(CLASS_COUNT)}
    as_numbers = make_config(segmentation={**SEGFORMER, "id2label": labels})
    as_text = make_config(segmentation={**SEGFORMER, "id2label": {str(key): name for key, name in labels.items()}})
    assert make_encoder(as_numbers).fingerprint == make_encoder(as_text).fingerprint


def test_an_encoder_stored_before_the_skip_existed_keeps_its_fingerprint(tmp_path: Path) -> None:
    original = make_encoder()
    original.save(tmp_path)
    config = tmp_path / "config.json"
    stored = json.loads(config.read_text())
    assert set(stored["fusion"]) == {
        "blocks", "dimension", "dropout", "heads", "latent_width", "mlp_ratio", "width"
    }  # fmt: skip
    assert ImageEncoder.load(tmp_path).fingerprint == original.fingerprint
    stored["fusion"]["vision_skip"] = False
    config.write_text(json.dumps(stored))
    assert ImageEncoder.load(tmp_path).fingerprint == original.fingerprint


def test_a_fingerprint_changes_with_any_weight_and_with_the_configuration() -> None:
    fingerprints = {make_encoder().fingerprint}
    for part in ("vision", "segmenter", "fusion"):
        changed = make_encoder()
        next(changed.get_submodule(part).parameters()).data.view(-1)[0] += 1e-3
        fingerprints.add(changed.fingerprint)
    buffered = make_encoder()
    next(buffers for name, buffers in buffered.named_buffers() if name.endswith("running_mean")).data[0] += 1e-3
    fingerprints.add(buffered.fingerprint)
    config = make_config()
    fingerprints.add(make_encoder(replace(config, vision=replace(config.vision, std=(1.0, 1.0, 1.0)))).fingerprint)
    assert len(fingerprints) == 6


def test_half_precision_storage_loses_nothing_once_rounded(tmp_path: Path) -> None:
    full = make_encoder(make_config())
    full.save(tmp_path / "full")
    half = make_encoder(make_config(weight_dtype="float16"))
    with pytest.raises(ValueError, match=r"not representable in float16: call round_to_storage\(\) first"):
        half.save(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    assert half.round_to_storage() is half
    half.save(tmp_path / "half")
    loaded = ImageEncoder.load(tmp_path / "half")
    assert loaded.fingerprint == half.fingerprint
    pixels = random_pixels(3)
    assert np.array_equal(loaded.encode(pixels), half.encode(pixels))
    np.testing.assert_allclose(half.encode(pixels), full.encode(pixels), atol=0.02)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("full", "half")]
    assert sizes[1] < 0.7 * sizes[0]


def test_rounding_to_single_precision_changes_nothing() -> None:
    built = make_encoder()
    before = built.fingerprint
    assert built.round_to_storage().fingerprint == before


def test_weights_too_large_for_half_precision_are_refused() -> None:
    built = make_encoder(make_config(weight_dtype="float16"))
    built.fusion.class_token.data[0] = 1e6
    with pytest.raises(ValueError, match=r"fusion\.class_token holds values too large for float16"):
        built.round_to_storage()


def test_loading_does_not_move_the_global_random_stream(saved: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    ImageEncoder.load(saved)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(EncoderError, match=rf"encoder in .* misses {file}"):
        ImageEncoder.load(saved)


def test_a_missing_directory_is_an_encoder_error(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"misses config\.json"):
        ImageEncoder.load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"\xff" * 64, lambda raw: b""])
def test_damaged_weights_are_refused(saved: Path, damage: Callable[[bytes], bytes]) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(EncoderError, match="cannot be read"):
        ImageEncoder.load(saved)


def test_a_pickle_in_the_place_of_the_weights_is_never_unpickled(saved: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    torch.save({"weights": Bomb()}, saved / "model.safetensors")
    with pytest.raises(EncoderError, match="cannot be read"):
        ImageEncoder.load(saved)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("content", [b'{"vision": ', b"\xff\xfe\x00", b""])
def test_a_configuration_that_is_not_json_is_refused(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(EncoderError, match="cannot be read"):
        ImageEncoder.load(saved)


def without(section: str | None, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda fields: (fields if section is None else fields[section]).pop(key)


def with_value(section: str | None, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: (fields if section is None else fields[section]).update({key: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without(None, "fusion"), "fusion"),
        (without("vision", "backbone"), "backbone"),
        (with_value("fusion", "depth", 3), "depth"),
        (with_value("segmentation", "classes", 3), "classes"),
        (with_value(None, "version", 2), "version"),
        (with_value(None, "vision", None), "malformed"),
        (with_value(None, "weight_dtype", "float8"), "'float8' is unknown"),
        (with_value("fusion", "blocks", -1), "blocks is -1"),
        (with_value("fusion", "heads", "two"), "malformed"),
        (with_value("vision", "backbone", {"model_type": "nonsense"}), "'nonsense' is not known"),
        (with_value("segmentation", "class_count", 4), "class_count is 4"),
    ],
)
def test_a_configuration_of_another_kind_is_refused_with_the_reason(
    saved: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    path = saved / "config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(EncoderError, match=rf"encoder in .*{reason}"):
        ImageEncoder.load(saved)


def test_a_configuration_that_is_a_list_is_refused(saved: Path) -> None:
    (saved / "config.json").write_text("[1, 2]")
    with pytest.raises(EncoderError, match="malformed"):
        ImageEncoder.load(saved)


def test_weights_of_another_size_are_refused(saved: Path) -> None:
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"dimension": 12', '"dimension": 14'))
    with pytest.raises(EncoderError, match=r"weights do not fit the configuration[\s\S]*fusion\.projection\.weight"):
        ImageEncoder.load(saved)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_too_few_and_too_many_weights_are_refused(saved: Path, change: str) -> None:
    weights = load_file(saved / "model.safetensors")
    if change == "missing":
        del weights["fusion.class_token"]
    else:
        weights["fusion.other_token"] = torch.zeros(3)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(EncoderError, match=r"weights do not fit the configuration[\s\S]*fusion\.(class|other)_token"):
        ImageEncoder.load(saved)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_full_size_encoder_has_the_published_number_of_parameters_and_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = ImageEncoder(EncoderConfig.full_size())
    counts = built.parameter_counts()
    # OpenAI's ViT-L/14-336 has 303.5 million parameters without its text tower, OneFormer's Swin-L 219 million.
    assert counts == {"vision": 303_507_456, "segmentation": 218_814_219, "fusion": 894_272}
    for count in (*counts.values(), sum(counts.values())):
        assert f"{count:,}" in (ImageEncoder.__doc__ or "")
    assert (built.vision.grid, built.vision.token_count, built.vision.width) == ((24, 24), 577, 1024)
    assert (built.dimension, built.image_size) == (768, 640)
    v = built.encode(random_pixels(1, 640))
    assert v.shape == (1, 768)
    np.testing.assert_allclose(np.linalg.norm(v), 1.0, atol=1e-5)
    for threads, images in [(1, 1), (2, 1), (4, 2), (16, 8), (64, 29), (96, 32)]:
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert built.useful_batch_size(32) == images
