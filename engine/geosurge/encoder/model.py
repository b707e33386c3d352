"""The whole encoder: canonical pixels in, unit visual embeddings out; saved as a JSON configuration and safetensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from geosurge.devices import check_torch_device
from geosurge.encoder.fusion import Fusion, FusionConfig, VisionHead
from geosurge.encoder.graph import MAX_PARAMETERS, as_graph
from geosurge.encoder.segmentation import SegmentationConfig, Segmenter
from geosurge.encoder.vision import VisionConfig, VisionTower
from geosurge.errors import EncoderError
from geosurge.preprocessing import Preprocessing

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_TOKENS_A_THREAD: Final = 256
"""Tokens whose products keep a thread of the CPU busy in a large encoder: fewer than an image's of 336 pixels."""

WeightDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class EncoderConfig:
    """Everything that is needed to rebuild an encoder but its weights.

    Attributes:
        vision: The vision tower.
        segmentation: The segmenter.
        fusion: The fusion module.
        weight_dtype: Type that the weights are stored in; they are computed with in float32.
        jpeg_draft: See `geosurge.preprocessing.Preprocessing`.
    """

    vision: VisionConfig
    segmentation: SegmentationConfig
    fusion: FusionConfig
    weight_dtype: WeightDtype = "float32"
    jpeg_draft: bool = True

    def __post_init__(self) -> None:
        """Checks the storage type.

        Raises:
            EncoderError: It is none of those known.
        """
        if self.weight_dtype not in get_args(WeightDtype):
            raise EncoderError(
                f"weight_dtype {self.weight_dtype!r} is unknown; it is one of {', '.join(get_args(WeightDtype))}"
            )

    @classmethod
    def full_size(cls) -> Self:
        """The encoder of GeoSURGE: CLIP ViT-L/14-336 and OneFormer Swin-L."""
        return cls(VisionConfig.clip_vit_large_336(), SegmentationConfig.oneformer_ade20k_swin_large(), FusionConfig())

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Reads a configuration from its JSON form.

        Args:
            fields: What `asdict` gave, as parsed from JSON.

        Returns:
            The configuration.

        Raises:
            EncoderError: A field is missing, unknown or malformed.
        """

        def as_tuples(section: Mapping[str, Any]) -> dict[str, Any]:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}

        try:
            known = dict(fields)
            return cls(
                vision=VisionConfig(**as_tuples(known.pop("vision"))),
                segmentation=SegmentationConfig(**as_tuples(known.pop("segmentation"))),
                fusion=FusionConfig(**known.pop("fusion")),
                **known,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EncoderError(f"encoder configuration has a missing, unknown or malformed field: {error}") from error

    def to_json(self) -> str:
        """The configuration as JSON text; equal configurations give equal text, stored in between or not."""
        # Keys that are numbers (class labels) sort otherwise before they were JSON than after.
        fields = json.loads(json.dumps(asdict(self)))
        # Encoders that were stored before the field existed keep their fingerprint, and so open.
        if not fields["fusion"]["vision_skip"]:
            del fields["fusion"]["vision_skip"]
        return json.dumps(fields, indent=2, sort_keys=True)


class TowerOutputs(NamedTuple):
    """What the two towers see in images: all that the fusion module needs of them.

    Attributes:
        tokens: (n, t, c) tokens of the vision tower.
        fractions: (n, rows * columns, classes) class fractions of the patches; None without fusion.
    """

    tokens: Tensor
    fractions: Tensor | None


class ImageEncoder(nn.Module):
    """Frozen or trained vision tower + frozen segmenter + fusion.

    At full size (`EncoderConfig.full_size`) the vision tower has 303,507,456 parameters, the segmenter 218,814,219 and
    the fusion module 894,272: 523,215,947 in all.

    Attributes:
        config: The configuration.
        vision: The vision tower.
        segmenter: The segmenter.
        fusion: The fusion module; without fusion, what stands in its place.
    """

    fusion: Fusion | VisionHead

    def __init__(
        self, config: EncoderConfig, vision: VisionTower | None = None, segmenter: Segmenter | None = None
    ) -> None:
        """Builds the encoder, in evaluation mode.

        Args:
            config: The configuration.
            vision: The vision tower, where it is at hand already; otherwise it is built with random weights.
            segmenter: The segmenter, likewise.

        Raises:
            EncoderError: The configuration is wrong.
        """
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision) if vision is None else vision
        self.segmenter = Segmenter(config.segmentation) if segmenter is None else segmenter
        rows, columns = self.vision.grid
        if config.fusion.blocks == 0:
            self.fusion = VisionHead(config.fusion, self.vision.width, self.vision.token_count, rows * columns)
        else:
            self.fusion = Fusion(
                config.fusion,
                vision_width=self.vision.width,
                token_count=self.vision.token_count,
                class_count=config.segmentation.class_count,
                cells=rows * columns,
            )
        self._graph: Callable[[Tensor], Tensor] | None = None
        self._is_large = sum(self.parameter_counts().values()) > MAX_PARAMETERS
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        # A graph cannot be copied; a copy of the encoder works without.
        return {**self.__dict__, "_graph": None}

    @property
    def dimension(self) -> int:
        """Length of the visual embedding."""
        return self.config.fusion.dimension

    @property
    def image_size(self) -> int:
        """Side of the canonical square that both towers' inputs are made from, pixels."""
        return max(self.config.vision.image_size, self.config.segmentation.image_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.fusion.projection.weight.device

    @property
    def preprocessing(self) -> Preprocessing:
        """The way from an image to canonical pixels; safe to use from many threads at once."""
        return Preprocessing(self.image_size, self.config.jpeg_draft)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration and every weight, hexadecimal: two encoders with one fingerprint agree."""
        digest = hashlib.sha256(self.config.to_json().encode())
        for name, tensor in sorted(self.state_dict().items()):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def useful_batch_size(self, limit: int) -> int:
        """How many images are worth computing together.

        A large encoder on the CPU gains nothing from more than keep its threads busy (at full size one for two
        threads), and each image more takes memory (0.6 GB at full size) and has all others wait for it.

        Args:
            limit: How many there may be at most.

        Returns:
            That many, or fewer.
        """
        if not self._is_large or self.device.type != "cpu":
            return limit
        return min(limit, math.ceil(_TOKENS_A_THREAD * torch.get_num_threads() / self.vision.token_count))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeds canonical pixels.

        Args:
            pixels: (n, 3, s, s) uint8.

        Returns:
            (n, dimension) float32, unit rows.
        """
        return self.fuse(self.towers(pixels))

    def towers(self, pixels: Tensor) -> TowerOutputs:
        """Runs the vision tower and, where there is fusion, the segmenter.

        Args:
            pixels: (n, 3, s, s) uint8.

        Returns:
            What they see; a frozen tower's output carries no gradient.
        """
        seen = self.vision(pixels)
        return TowerOutputs(seen.tokens, None if self.config.fusion.blocks == 0 else self.segmenter(pixels, seen.grid))

    def fuse(self, seen: TowerOutputs) -> Tensor:
        """Embeds what the towers saw.

        Args:
            seen: Their outputs.

        Returns:
            (n, dimension) float32, unit rows.
        """
        embeddings: Tensor = self.fusion(seen.tokens) if seen.fractions is None else self.fusion(*seen)
        return embeddings

    @torch.inference_mode()
    def encode(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embeds canonical pixels for search; `useful_batch_size` of them are computed together.

        Args:
            pixels: (n, 3, image_size, image_size) uint8, as `preprocessing` makes them; n may be 0.

        Returns:
            (n, dimension) float32, unit rows.

        Raises:
            ValueError: The array has another shape or type.
            RuntimeError: The encoder is in training mode, where an embedding depends on chance and on its batch.
        """
        batch = self._batch(pixels)
        if len(batch) == 0:
            return np.empty((0, self.dimension), dtype=np.float32)
        forward = self._graph if self._graph is not None and batch.device.type == "cpu" else self
        parts = [forward(part).cpu() for part in torch.split(batch, self.useful_batch_size(len(batch)))]
        embeddings: npt.NDArray[np.float32] = torch.cat(parts).numpy()
        return embeddings

    @torch.inference_mode()
    def attention_weights(self, pixels: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        """Attention weights of every fusion block, for inspection.

        Args:
            pixels: As for `encode`, at least one image.

        Returns:
            For each block (n, heads, 1 + cells, tokens + 1 + cells); see `Fusion.attention_weights` for the axes. None
            at all without fusion.

        Raises:
            ValueError: As for `encode`.
            RuntimeError: As for `encode`.
        """
        batch = self._batch(pixels)
        seen = self.towers(batch)
        if not isinstance(self.fusion, Fusion) or seen.fractions is None:
            return []
        return [block.cpu().numpy() for block in self.fusion.attention_weights(seen.tokens, seen.fractions)]

    def _batch(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        expected = (3, self.image_size, self.image_size)
        if pixels.ndim != 4 or pixels.shape[1:] != expected or pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels must be (n, {', '.join(map(str, expected))}) uint8, not {pixels.shape} {pixels.dtype}"
            )
        if self.training:
            raise RuntimeError("the encoder is in training mode; call eval() before encoding for search")
        # Views with negative strides and read-only arrays cannot become tensors as they are.
        return torch.from_numpy(np.require(pixels, requirements=("C", "W"))).to(self.device)

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of each part."""
        parts = {"vision": self.vision, "segmentation": self.segmenter, "fusion": self.fusion}
        return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}

    def round_to_storage(self) -> Self:
        """Rounds every weight to what will be stored, so that the encoder in memory is the one that is saved.

        Returns:
            The encoder itself.

        Raises:
            ValueError: A weight is too large for the storage type.
        """
        if self.config.weight_dtype == "float16":
            with torch.no_grad():
                for name, tensor in self.state_dict().items():
                    if not tensor.is_floating_point():
                        continue
                    rounded = tensor.to(torch.float16).to(tensor.dtype)
                    if not torch.equal(rounded.isfinite(), tensor.isfinite()):
                        raise ValueError(f"{name} holds values too large for float16; store the encoder in float32")
                    tensor.copy_(rounded)
        return self

    def save(self, directory: Path) -> None:
        """Writes `config.json` and `model.safetensors`.

        Args:
            directory: Created when missing.

        Raises:
            ValueError: The weights do not survive the storage type; call `round_to_storage` first.
        """
        stored_dtype = getattr(torch, self.config.weight_dtype)
        stored = {}
        for name, tensor in self.state_dict().items():
            values = tensor.detach().cpu().contiguous()
            stored[name] = values.to(stored_dtype) if values.is_floating_point() else values
            if not torch.equal(stored[name].to(values.dtype), values):
                raise ValueError(
                    f"{name} is not representable in {self.config.weight_dtype}: call round_to_storage() first"
                )
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(self.config.to_json() + "\n", encoding="utf-8")
        save_file(stored, directory / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """Reads an encoder that `save` wrote. On the CPU, a small one encodes as a graph (`geosurge.encoder.graph`).

        Args:
            directory: The encoder's directory.
            device: Torch device to put it on.

        Returns:
            The encoder in evaluation mode.

        Raises:
            EncoderError: A file is missing or damaged, or weights and configuration do not fit.
            UsageError: The device is unknown, or there is no such GPU.
        """
        check_torch_device(device)
        try:
            fields = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
            weights = load_file(directory / WEIGHTS_FILE)
        except FileNotFoundError as error:
            raise EncoderError(f"encoder in {directory} misses {Path(error.filename or WEIGHTS_FILE).name}") from error
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
            raise EncoderError(f"encoder in {directory} cannot be read: {error}") from error
        try:
            config = EncoderConfig.from_dict(fields)
            # The random weights are overwritten at once; drawing them must not move anybody else's randomness.
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                encoder = cls(config)
        except EncoderError as error:
            raise EncoderError(f"encoder in {directory}: {error}") from error
        try:
            encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise EncoderError(f"encoder in {directory}: weights do not fit the configuration: {error}") from error
        # The convolutions' weights too: in another layout they are rearranged at every call.
        encoder = encoder.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        if encoder.device.type == "cpu":
            encoder._graph = as_graph(encoder)
        return encoder
