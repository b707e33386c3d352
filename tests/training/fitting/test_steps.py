from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning_fabric import Fabric
from support.backbones import CLASS_COUNT, CLIP, RESNET, SEGFORMER, Settings
from support.geocells import whole_loss
from torch import Tensor

from geosurge.encoder import EncoderConfig, FusionConfig, ImageEncoder, SegmentationConfig, VisionConfig
from geosurge.geodesy import latlng_to_unit_vector
from geosurge_training.fitting.geocells import GeocellEmbeddings, Head, Labels, Negatives
from geosurge_training.fitting.label_smoothing import LabelSmoothing
from geosurge_training.fitting.steps import compute_gradients, part_seed
from geosurge_training.fitting.trainable import Trainable

COUNTS = (3, 7, 12)
IMAGES = 11


def make_model(
    vision: Settings = CLIP, *, frozen: bool = False, dropout: float = 0.3, head: Head = "embeddings"
) -> Trainable:
    torch.manual_seed(1)
    config = EncoderConfig(
        VisionConfig(vision, 32, frozen=frozen),
        SegmentationConfig(SEGFORMER, 32, CLASS_COUNT),
        FusionConfig(dimension=12, width=16, latent_width=8, heads=2, blocks=2, dropout=dropout),
    )
    return Trainable(ImageEncoder(config), GeocellEmbeddings(COUNTS, 12, head=head)).train()


def make_batch() -> tuple[Tensor, Labels]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    # Cells that several images share, that one part of the batch has alone, and images without a cell.
    ordinals = torch.stack([torch.randint(-1, count, (IMAGES,), generator=generator) for count in COUNTS], dim=1)
    ordinals[:4, 2] = -1
    degrees = torch.rand(IMAGES, 2, generator=generator, dtype=torch.float64) * 100 - 50
    return pixels, Labels(ordinals, torch.from_numpy(latlng_to_unit_vector(*degrees.numpy().T)))


def make_smoothing() -> LabelSmoothing:
    generator = torch.Generator().manual_seed(3)
    places = [torch.rand(count, 2, generator=generator, dtype=torch.float64) * 100 - 50 for count in COUNTS]
    return LabelSmoothing.of_cells(
        2000.0, [(place[:, 0].numpy(), place[:, 1].numpy()) for place in places], torch.device("cpu")
    )


def gradients(model: Trainable) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def in_parts(model: Trainable, negatives: Negatives, micro_batch_size: int, smoothing: LabelSmoothing | None) -> Tensor:
    pixels, labels = make_batch()
    return compute_gradients(
        Fabric(accelerator="cpu", devices=1),
        model,
        lambda rows: model.encoder(pixels[rows]),
        labels,
        negatives=negatives,
        micro_batch_size=micro_batch_size,
        seed=lambda place: part_seed(7, 3, place),
        smoothing=smoothing,
    )


def in_one_graph(
    model: Trainable, negatives: Negatives, micro_batch_size: int, smoothing: LabelSmoothing | None
) -> Tensor:
    """The whole batch's loss in one graph; parts only say which random numbers dropout gets."""
    pixels, labels = make_batch()
    parts = []
    for start in range(0, IMAGES, micro_batch_size):
        torch.manual_seed(part_seed(7, 3, start))
        parts.append(model.encoder(pixels[start : start + micro_batch_size]))
    counts = [int((labels.ordinals[:, level] >= 0).sum()) for level in range(len(COUNTS))]
    losses = model.geocells.losses(
        torch.cat(parts), labels, model.geocells.candidates(labels.ordinals, negatives), counts, smoothing
    )
    losses.sum().backward()
    return losses.detach()


@pytest.mark.parametrize("negatives", ["batch", "all_cells"])
@pytest.mark.parametrize("smoothed", [False, True], ids=["hard", "smoothed"])
@pytest.mark.parametrize("micro_batch_size", [1, 4, IMAGES])
def test_the_gradient_in_parts_is_that_of_the_whole_batch(
    negatives: Negatives, smoothed: bool, micro_batch_size: int
) -> None:
    smoothing = make_smoothing() if smoothed else None
    model, whole = make_model(), make_model()
    losses = in_parts(model, negatives, micro_batch_size, smoothing)
    torch.testing.assert_close(losses, in_one_graph(whole, negatives, micro_batch_size, smoothing))
    found, expected = gradients(model), gradients(whole)
    assert found.keys() == expected.keys()
    assert sum(float(gradient.abs().sum()) for gradient in expected.values()) > 1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_without_dropout_the_gradient_does_not_depend_on_the_parts_at_all() -> None:
    results = []
    for micro_batch_size in (IMAGES, 5, 2):
        model = make_model(dropout=0.0)
        results.append((in_parts(model, "batch", micro_batch_size, None), gradients(model)))
    for losses, found in results[1:]:
        torch.testing.assert_close(losses, results[0][0])
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_every_part_sees_the_negatives_of_the_whole_batch() -> None:
    pixels, labels = make_batch()
    model = make_model(dropout=0.0)
    whole = in_parts(model, "batch", 2, None)
    alone = torch.stack(
        [
            whole_loss(
                model.geocells, model.encoder(pixels[start : start + 2]), labels.ordinals[start : start + 2], "batch"
            )
            for start in range(0, IMAGES, 2)
        ]
    ).mean(dim=0)
    # Cutting the batch without its negatives would make the task easier.
    assert (whole > alone + 0.3).all()


@pytest.mark.parametrize("micro_batch_size", [3, IMAGES])
def test_frozen_towers_see_each_image_once_a_step_and_keep_no_graph(micro_batch_size: int) -> None:
    model = make_model(frozen=True)
    seen: dict[str, list[int]] = {"vision": [], "segmentation": []}

    def counter(name: str) -> Callable[..., None]:
        def count(_module: object, _inputs: object, outputs: dict[str, Tensor]) -> None:
            tensor = next(iter(outputs.values()))
            assert not tensor.requires_grad
            seen[name].append(len(tensor))

        return count

    model.encoder.vision.backbone.register_forward_hook(counter("vision"))
    model.encoder.segmenter.backbone.register_forward_hook(counter("segmentation"))
    in_parts(model, "batch", micro_batch_size, None)
    for sizes in seen.values():
        assert sum(sizes) == IMAGES
        assert max(sizes) == micro_batch_size
    assert not any(name.startswith(("encoder.vision", "encoder.segmenter")) for name in gradients(model))


def test_a_classifier_learns_its_weights_and_no_temperature() -> None:
    model = make_model(head="classifier")
    in_parts(model, "all_cells", 4, None)
    found = gradients(model)
    assert "geocells.log_temperatures" not in found
    assert all(float(found[f"geocells.tables.{level}"].abs().sum()) > 0 for level in range(len(COUNTS)))


def test_batch_normalisation_sees_the_part_it_is_given() -> None:
    model = make_model(RESNET, dropout=0.0)
    whole = in_parts(model, "batch", IMAGES, None)
    model = make_model(RESNET, dropout=0.0)
    assert not torch.allclose(in_parts(model, "batch", 3, None), whole, rtol=1e-3)


def test_each_place_of_each_step_has_random_numbers_of_its_own() -> None:
    seeds = {part_seed(seed, step, place) for seed in (0, 1) for step in range(30) for place in range(30)}
    assert len({seed % 2**32 for seed in seeds}) == 2 * 30 * 30
