from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.backbones import (
    CLASS_COUNT,
    CLIP,
    CONVNEXT,
    DINO,
    MASK2FORMER,
    ONEFORMER,
    RESNET,
    SEGFORMER,
    SWIN,
    Settings,
)
from torch import Tensor

from geosurge.encoder import EncoderConfig, FusionConfig, ImageEncoder, SegmentationConfig, VisionConfig
from geosurge.encoder import graph as graphs
from geosurge.encoder.segmentation import ONEFORMER_TASK_TOKENS

SIDE = 32
FUSION = FusionConfig(dimension=12, width=16, latent_width=8, heads=2, blocks=2)
FLAT_SWIN = {**SWIN, "depths": [1, 1], "num_heads": [1, 1], "out_features": ["stage1"]}

PART_THREADS = 3


def make_config(vision: Settings = RESNET, segmentation: Settings = SEGFORMER) -> EncoderConfig:
    kind = segmentation["model_type"]
    return EncoderConfig(
        VisionConfig(vision, SIDE),
        SegmentationConfig(
            segmentation,
            SIDE if kind == "segformer" else 2 * SIDE,
            CLASS_COUNT,
            task_tokens=ONEFORMER_TASK_TOKENS if kind == "oneformer" else None,
        ),
        FUSION,
    )


def save_encoder(directory: Path, config: EncoderConfig | None = None, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    ImageEncoder(config or make_config()).save(directory)
    return directory


def random_pixels(count: int, side: int = SIDE, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), np.uint8)


@torch.inference_mode()
def forward(encoder: ImageEncoder, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    array: NDArray[np.float32] = encoder(torch.from_numpy(pixels)).numpy()
    return array


def assert_encodes_as_forward(encoder: ImageEncoder, counts: tuple[int, ...] = (1, 2, 3, 5, 9)) -> None:
    for count in counts:
        pixels = random_pixels(count, encoder.image_size, seed=count)
        np.testing.assert_allclose(encoder.encode(pixels), forward(encoder, pixels), atol=1e-5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def none_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(graphs, "_graphs", {})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, none_recorded: None) -> list[ImageEncoder]:
    """The encoders that have been recorded."""
    encoders: list[ImageEncoder] = []
    record = graphs._record

    def spy(encoder: ImageEncoder, places: Any) -> Any:
        encoders.append(encoder)
        return record(encoder, places)

    monkeypatch.setattr(graphs, "_record", spy)
    return encoders


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the parts that batches were split into; the threads for them have yet to be started."""
    sizes: list[int] = []
    pools: list[ThreadPoolExecutor] = []
    start, run_part = graphs._part_threads.__wrapped__, graphs._run_part

    def start_and_remember(count: int, process: int) -> ThreadPoolExecutor:
        pools.append(start(count, process))
        return pools[-1]

    def spy(graph: graphs._Graph, weights: Sequence[Tensor], pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return run_part(graph, weights, pixels)

    monkeypatch.setattr(graphs, "_part_threads", cache(start_and_remember))
    monkeypatch.setattr(graphs, "_run_part", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(PART_THREADS)
    yield sizes
    torch.set_num_threads(before)
    for pool in pools:
        pool.shutdown()


@pytest.mark.parametrize(
    ("vision", "segmentation"),
    [
        pytest.param(
            vision,
            segmentation,
            id=f"{vision['model_type']}-{segmentation['model_type']}",
            # Each backbone in one pair at least is quick enough for every day.
            marks=[] if vision is RESNET or segmentation is SEGFORMER else pytest.mark.slow,
        )
        for vision in (CLIP, DINO, RESNET, CONVNEXT, FLAT_SWIN)
        for segmentation in (SEGFORMER, MASK2FORMER, ONEFORMER)
    ],
)
def test_a_loaded_encoder_has_a_graph_and_encodes_as_it_does_without(
    vision: Settings, segmentation: Settings, tmp_path: Path
) -> None:
    loaded = ImageEncoder.load(save_encoder(tmp_path, make_config(vision, segmentation)))
    assert loaded._graph is not None
    assert_encodes_as_forward(loaded)


def test_an_encoder_that_was_not_loaded_has_no_graph() -> None:
    assert ImageEncoder(make_config())._graph is None


def test_an_encoder_without_a_graph_encodes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geosurge.encoder.model.as_graph", lambda encoder: None)
    loaded = ImageEncoder.load(saved)
    assert loaded._graph is None
    assert_encodes_as_forward(loaded)


def test_recording_leaves_the_encoder_as_it_was(saved: Path, none_recorded: None) -> None:
    loaded = ImageEncoder.load(saved)
    torch.manual_seed(0)
    original = ImageEncoder(make_config())
    assert loaded.fingerprint == original.fingerprint
    for (name, one), (other_name, other) in zip(loaded.named_parameters(), original.named_parameters(), strict=True):
        assert (name, one.requires_grad) == (other_name, other.requires_grad)
        assert type(one) is torch.nn.Parameter


def test_encoders_of_one_configuration_share_a_recording_but_no_weights(
    tmp_path: Path, recorded: list[ImageEncoder]
) -> None:
    first, second = (ImageEncoder.load(save_encoder(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert recorded == [first]
    assert second._graph is not None
    pixels = random_pixels(3)
    assert np.abs(first.encode(pixels) - second.encode(pixels)).max() > 0.01
    for encoder in (first, second, first):
        assert_encodes_as_forward(encoder)


def test_another_configuration_is_recorded_anew(tmp_path: Path, recorded: list[ImageEncoder]) -> None:
    for name, vision in (("resnet", RESNET), ("convnext", CONVNEXT)):
        assert_encodes_as_forward(ImageEncoder.load(save_encoder(tmp_path / name, make_config(vision))))
    assert len(recorded) == 2


def with_other_parameters(encoder: ImageEncoder) -> None:
    with torch.no_grad():
        for parameter in encoder.fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def with_other_statistics(encoder: ImageEncoder) -> None:
    for name, buffer in encoder.vision.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(1.0)


def with_another_parameter_object(encoder: ImageEncoder) -> None:
    encoder.fusion.class_token = torch.nn.Parameter(torch.randn_like(encoder.fusion.class_token))


def with_the_state_of_another(encoder: ImageEncoder) -> None:
    encoder.load_state_dict(ImageEncoder(encoder.config).state_dict())


@pytest.mark.parametrize(
    "change",
    [with_other_parameters, with_other_statistics, with_another_parameter_object, with_the_state_of_another],
)
def test_weights_that_change_after_loading_are_followed(saved: Path, change: Callable[[ImageEncoder], None]) -> None:
    loaded = ImageEncoder.load(saved)
    pixels = random_pixels(3)
    before = loaded.encode(pixels)
    torch.manual_seed(1)
    change(loaded)
    assert np.abs(loaded.encode(pixels) - before).max() > 1e-3
    assert_encodes_as_forward(loaded)


class SeesTheBatchSize(ImageEncoder):
    def forward(self, pixels: Tensor) -> Tensor:
        embeddings = super().forward(pixels)
        return -embeddings if len(pixels) > 2 else embeddings


class SeesTheData(ImageEncoder):
    def forward(self, pixels: Tensor) -> Tensor:
        embeddings = super().forward(pixels)
        return embeddings * float(pixels.to(torch.float32).mean())


class SeesTheWeights(ImageEncoder):
    def forward(self, pixels: Tensor) -> Tensor:
        embeddings = super().forward(pixels)
        return embeddings * float(self.fusion.class_token.abs().max())


class FailsWhenItIsRecorded(ImageEncoder):
    def forward(self, pixels: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise NotImplementedError("not while it is recorded")
        return super().forward(pixels)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (SeesTheBatchSize, "a batch of 5 differs"),
        (SeesTheData, "differs"),
        (SeesTheWeights, "differs"),
        (FailsWhenItIsRecorded, "NotImplementedError: not while it is recorded"),
    ],
)
def test_an_encoder_that_cannot_be_recorded_encodes_without_a_graph(
    kind: type[ImageEncoder],
    cause: str,
    saved: Path,
    recorded: list[ImageEncoder],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "geosurge.encoder.graph"):
        loaded = [kind.load(saved) for _ in range(2)]
    # One that cannot be recorded may be an encoder with bad weights, so the next is tried again.
    assert recorded == loaded
    told = [record for record in caplog.records if record.name == "geosurge.encoder.graph"]
    assert [record.levelno for record in told] == [logging.INFO] * 2
    assert cause in told[0].__dict__["cause"]
    for encoder in loaded:
        assert encoder._graph is None
        assert_encodes_as_forward(encoder)


def test_a_large_encoder_is_not_recorded(
    saved: Path, recorded: list[ImageEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = ImageEncoder(make_config())
    tensors = [*encoder.parameters(), *encoder.buffers()]
    size = sum(tensor.numel() for tensor in tensors)
    monkeypatch.setattr(graphs, "MAX_PARAMETERS", size - 1)
    large = ImageEncoder.load(saved)
    assert large._graph is None
    assert not recorded
    assert_encodes_as_forward(large)
    monkeypatch.setattr(graphs, "MAX_PARAMETERS", size)
    assert ImageEncoder.load(saved)._graph is not None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_loaded_encoder_encodes_the_same(
    copied: Callable[[ImageEncoder], ImageEncoder], saved: Path
) -> None:
    loaded = ImageEncoder.load(saved)
    twin = copied(loaded)
    assert loaded._graph is not None
    assert twin._graph is None
    assert twin.fingerprint == loaded.fingerprint
    pixels = random_pixels(3)
    expected = loaded.encode(pixels)
    np.testing.assert_allclose(twin.encode(pixels), expected, atol=1e-5)
    with torch.no_grad():
        twin.fusion.class_token.add_(1.0)
    np.testing.assert_array_equal(loaded.encode(pixels), expected)


@pytest.mark.parametrize("position", [0, 1], ids=["recorded", "not-recorded"])
def test_a_graph_keeps_no_weights_alive(position: int, saved: Path, none_recorded: None) -> None:
    loaded = [ImageEncoder.load(saved) for _ in range(2)]
    for encoder in loaded:
        encoder.encode(random_pixels(3))
    dropped = loaded.pop(position)
    weights = [weakref.ref(tensor) for tensor in (*dropped.parameters(), *dropped.buffers())]
    del dropped, encoder
    gc.collect()
    assert (ImageEncoder, make_config().to_json()) in graphs._graphs
    assert sum(reference() is not None for reference in weights) == 0
    assert_encodes_as_forward(loaded[0])


def test_a_batch_that_gives_every_thread_two_images_is_encoded_in_parts(saved: Path, parts: list[int]) -> None:
    loaded = ImageEncoder.load(saved)
    for count, expected in ((1, []), (5, []), (6, [2, 2, 2]), (7, [2, 2, 3]), (20, [6, 7, 7])):
        parts.clear()
        pixels = random_pixels(count)
        np.testing.assert_allclose(loaded.encode(pixels), forward(loaded, pixels), atol=1e-5)
        assert sorted(parts) == expected


def test_encoding_in_parts_leaves_the_number_of_threads_as_it_was(saved: Path, parts: list[int]) -> None:
    loaded = ImageEncoder.load(saved)
    seen_earlier: list[int] = []
    encoded = threading.Event()

    def look_later() -> None:
        encoded.wait(30)
        seen_earlier.append(torch.get_num_threads())

    earlier = threading.Thread(target=look_later)
    earlier.start()
    loaded.encode(random_pixels(9))
    encoded.set()
    earlier.join()
    assert len(parts) == PART_THREADS
    assert torch.get_num_threads() == PART_THREADS
    assert seen_earlier == [PART_THREADS]
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == PART_THREADS


def test_a_part_is_computed_by_its_own_thread_alone(
    saved: Path, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def count_threads(pixels: Tensor, *weights: Tensor) -> Tensor:
        counts.append(torch.get_num_threads())
        return torch.zeros(len(pixels), FUSION.dimension)

    monkeypatch.setattr(graphs, "_graphs", {(ImageEncoder, make_config().to_json()): count_threads})
    loaded = ImageEncoder.load(saved)
    for _ in range(2):
        loaded.encode(random_pixels(9))
    assert counts == [1] * 6


def test_many_callers_at_once_get_their_own_embeddings(saved: Path, parts: list[int]) -> None:
    loaded = ImageEncoder.load(saved)
    batches = [random_pixels(1 + seed % 8, seed=seed) for seed in range(24)]
    expected = [forward(loaded, pixels) for pixels in batches]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(expected, pool.map(loaded.encode, batches), strict=True):
            np.testing.assert_allclose(other, one, atol=1e-5)
    assert parts


@pytest.mark.parametrize("position", [0, 4, 8])
def test_what_fails_in_one_part_is_raised_to_the_caller(
    position: int, saved: Path, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_white(pixels: Tensor, *weights: Tensor) -> Tensor:
        if bool((pixels == 255).flatten(1).all(dim=1).any()):
            raise RuntimeError("white")
        return torch.ones(len(pixels), FUSION.dimension)

    monkeypatch.setattr(graphs, "_graphs", {(ImageEncoder, make_config().to_json()): fail_at_white})
    loaded = ImageEncoder.load(saved)
    pixels = random_pixels(9)
    pixels[position] = 255
    with pytest.raises(RuntimeError, match="white"):
        loaded.encode(pixels)
    assert len(parts) > 1
    assert loaded.encode(random_pixels(9)).shape == (9, FUSION.dimension)
