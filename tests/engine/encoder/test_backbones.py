from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.backbones import CLIP, ONEFORMER, RESNET, SWIN, Settings
from transformers import AutoModel, PreTrainedModel

from geosurge.encoder.backbones import backbone_config, load_pretrained, normalise_pixels, read_settings, unknown_fields
from geosurge.errors import EncoderError

REVISION = "0123456789abcdef0123456789abcdef01234567"


def clip_tower(settings: Settings = CLIP) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModel.from_config(backbone_config(settings))
    return model


@pytest.fixture
def saved_clip(tmp_path: Path) -> Path:
    clip_tower().save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def load(source: Path | str, revision: str | None = None) -> torch.nn.Module:
    return load_pretrained(lambda _: AutoModel, str(source), revision).backbone


def test_a_configuration_carries_its_fields() -> None:
    config = backbone_config(CLIP)
    assert config.model_type == "clip_vision_model"
    assert (config.hidden_size, config.patch_size) == (16, 8)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_size": 16}, "needs a `model_type`"),
        ({"model_type": "nonsense"}, "'nonsense' is not known"),
        ({"model_type": 3}, "3 is not known"),
        ({**CLIP, "hidden_size": "wide"}, "hidden_size"),
        ({**CLIP, "num_attention_heads": 3}, "attention heads"),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_reason(settings: Settings, reason: str) -> None:
    with pytest.raises(EncoderError, match=reason):
        backbone_config(settings)


def test_unknown_fields_are_found_in_nested_configurations_too() -> None:
    assert unknown_fields(CLIP) == unknown_fields(RESNET) == unknown_fields(ONEFORMER) == []
    assert unknown_fields({**CLIP, "hiden_size": 16}) == ["hiden_size"]
    wrong = {**ONEFORMER, "num_query": 6, "backbone_config": {**SWIN, "windowsize": 2}}
    assert unknown_fields(wrong) == ["backbone_config.windowsize", "num_query"]


def test_pixels_of_the_right_size_are_only_shifted_and_scaled() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 9, 9), np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (pixels / 255.0 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    result = normalise_pixels(torch.from_numpy(pixels), 9, mean, std)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
    as_float = normalise_pixels(torch.from_numpy(pixels).double(), 9, mean, std)
    assert torch.equal(as_float, result)


@pytest.mark.parametrize("size", [12, 20, 33])
def test_resizing_agrees_with_pillows_antialiased_bicubic(size: int) -> None:
    channel = np.random.default_rng(1).integers(0, 256, (20, 20), np.uint8)
    expected = Image.fromarray(channel.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(channel).expand(1, 3, -1, -1)
    result = normalise_pixels(pixels, size, (0.0,) * 3, (1 / 255.0,) * 3)
    for plane in result[0].numpy():
        np.testing.assert_allclose(plane, np.asarray(expected), atol=0.01)


def test_a_saved_backbone_gives_the_same_outputs_again(saved_clip: Path) -> None:
    loaded = load(saved_clip)
    assert not loaded.training
    inputs = torch.randn(2, 3, 32, 32)
    expected = clip_tower().eval()(inputs).last_hidden_state
    assert torch.equal(loaded(inputs).last_hidden_state, expected)


def test_weights_saved_in_half_precision_are_computed_with_in_single(tmp_path: Path) -> None:
    clip_tower().half().save_pretrained(tmp_path)
    pretrained = load_pretrained(lambda _: AutoModel, str(tmp_path), None)
    assert {parameter.dtype for parameter in pretrained.backbone.parameters()} == {torch.float32}
    assert AutoModel.from_config(backbone_config(pretrained.settings)).dtype == torch.float32


def test_settings_are_plain_json_that_rebuilds_the_configuration(tmp_path: Path) -> None:
    labels = {number: f"class {number}" for number in range(12)}
    clip_tower({**RESNET, "id2label": labels}).save_pretrained(tmp_path)
    pretrained = load_pretrained(lambda _: AutoModel, str(tmp_path), None)
    assert json.loads(json.dumps(pretrained.settings)) == pretrained.settings
    rebuilt = backbone_config(pretrained.settings)
    assert rebuilt.id2label == labels
    assert rebuilt.hidden_sizes == RESNET["hidden_sizes"]
    assert not {"transformers_version", "architectures", "dtype"} & set(pretrained.settings)


def test_overrides_reach_only_models_that_know_them(saved_clip: Path) -> None:
    overrides = {"attention_dropout": 0.25, "no_such_field": 1}
    pretrained = load_pretrained(lambda _: AutoModel, str(saved_clip), None, overrides)
    assert pretrained.settings["attention_dropout"] == 0.25
    assert "no_such_field" not in pretrained.settings


def test_colour_statistics_come_from_the_image_processor(saved_clip: Path) -> None:
    assert load_pretrained(lambda _: AutoModel, str(saved_clip), None).mean is None
    statistics = {"image_mean": [0.5, 0.25, 0.125], "image_std": [1, 0.5, 0.25]}
    (saved_clip / "preprocessor_config.json").write_text(json.dumps(statistics))
    pretrained = load_pretrained(lambda _: AutoModel, str(saved_clip), None)
    assert (pretrained.mean, pretrained.std) == ((0.5, 0.25, 0.125), (1.0, 0.5, 0.25))


def test_a_hub_id_needs_a_revision() -> None:
    with pytest.raises(EncoderError, match=r"'openai/clip-vit-base-patch32' is not a local directory.*`revision`"):
        load("openai/clip-vit-base-patch32")


def test_a_hub_id_that_is_not_at_hand_offline_says_how_to_get_it() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(EncoderError) as caught:
        load("openai/clip-vit-base-patch32", REVISION)
    message = str(caught.value)
    assert "'openai/clip-vit-base-patch32' cannot be loaded" in message
    assert f"hf download openai/clip-vit-base-patch32 --revision {REVISION} --local-dir DIR" in message


def test_a_configuration_is_read_without_weights(saved_clip: Path) -> None:
    whole = load_pretrained(lambda _: AutoModel, str(saved_clip), None)
    (saved_clip / "model.safetensors").unlink()
    assert read_settings(str(saved_clip), None) == whole.settings


def test_a_hub_id_that_is_not_at_hand_has_no_settings() -> None:
    assert read_settings("geosurge/no-such-model", "0" * 40) is None


def test_an_empty_directory_says_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"config\.json and safetensors weights"):
        load(tmp_path)


def test_a_pickled_checkpoint_is_never_read(saved_clip: Path) -> None:
    weights = saved_clip / "model.safetensors"
    torch.save(load_file(weights), saved_clip / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(EncoderError, match=r"no file named model\.safetensors.*other formats are never read"):
        load(saved_clip)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"\xff" * 64, lambda raw: b""])
def test_damaged_weights_are_refused(saved_clip: Path, damage: Callable[[bytes], bytes]) -> None:
    weights = saved_clip / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(EncoderError, match="cannot be loaded"):
        load(saved_clip)


@pytest.mark.parametrize("text", ['{"model_type":', '{"model_type": "nonsense"}', "{}"])
def test_a_damaged_configuration_is_refused(saved_clip: Path, text: str) -> None:
    (saved_clip / "config.json").write_text(text)
    with pytest.raises(EncoderError, match="cannot be loaded"):
        load(saved_clip)


def test_weights_that_a_file_lacks_are_not_left_random(saved_clip: Path) -> None:
    weights = load_file(saved_clip / "model.safetensors")
    name = next(name for name in weights if "q_proj.weight" in name)
    del weights[name]
    save_file(weights, saved_clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks 1 of the weights .*q_proj\.weight"):
        load(saved_clip)


def test_weights_of_another_size_are_refused(saved_clip: Path) -> None:
    config = saved_clip / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 32', '"intermediate_size": 48'))
    with pytest.raises(EncoderError, match=r"mlp\.fc\d.* is of shape .* but .*48.*do not belong together"):
        load(saved_clip)
