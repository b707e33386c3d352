"""Trains and measures every variant with every seed, each in a process of its own, and keeps what came out."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from geosurge.bundle import read_manifest
from geosurge.errors import ConfigurationError
from geosurge_training.ablations.study import BASE, PROTOTYPE_VIEWS, Variant, apply
from geosurge_training.aside import written_aside
from geosurge_training.building.build import build
from geosurge_training.evaluation.evaluate import EvaluationOptions, evaluate_views
from geosurge_training.fitting.fit import fit
from geosurge_training.prototypes.about import about_pictures, open_encoder
from geosurge_training.prototypes.build import PrototypeOptions, build_prototypes
from geosurge_training.prototypes.pictures import ViewPictures
from geosurge_training.recipe import Recipe
from geosurge_training.run_directory import bundle_path, claim_run

_LOGGER = logging.getLogger(__name__)

RESULT_FILE: Final = "result.json"
VIEWS_SEED: Final = 77
"""Seed of the held-out views that everything is measured on: no variant was fitted or chosen on them."""

_PROTOTYPE_SEED: Final = 1000


@dataclass(frozen=True)
class Result:
    """What came of a variant with one seed.

    Attributes:
        variant: Its name.
        seed: The seed.
        within_km: Share of the held-out views located within each of `THRESHOLDS_KM`.
        median_km: Median error.
        cells: Number of cells of each level.
        parameters: Parameters of the encoder.
        seconds: Time of training, building and measuring.
    """

    variant: str
    seed: int
    within_km: dict[int, float]
    median_km: float
    cells: tuple[int, ...]
    parameters: int
    seconds: float


def run_study(
    recipe: Recipe, variants: Sequence[Variant], seeds: Sequence[int], directory: Path, *, views: int, jobs: int
) -> list[Result]:
    """Trains and measures; what a study that was cut off has done already is not done again.

    Args:
        recipe: What is varied.
        variants: The variants.
        seeds: Every variant is trained with each.
        directory: Where runs and results are kept.
        views: Held-out views to measure on.
        jobs: Processes at once, of one thread each, so that a result does not depend on how many there are.

    Returns:
        A result for each variant and seed, in this order.

    Raises:
        ConfigurationError: The directory holds results of another recipe, or of other views.
        GeoSurgeError: A variant cannot be trained or measured; those that run are finished, and no others begun.
    """
    # Indexes that are made without training need an encoder that is trained.
    trained = [variant for variant in variants if variant.built_by == "training"]
    untrained = [variant for variant in variants if variant.built_by != "training"]
    # Inherited by the processes: libraries read it when they are loaded.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    results: dict[tuple[str, int], Result] = {}
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(logging.getLogger().level,))
    try:
        for phase in (trained, untrained):
            wanted = [(variant, seed) for seed in seeds for variant in phase]
            futures = [pool.submit(_measure, recipe, variant, seed, directory, views) for variant, seed in wanted]
            for future in as_completed(futures):
                result = future.result()
                results[result.variant, result.seed] = result
                _LOGGER.info(
                    "%s, seed %d: %.1f %% within 200 km (%d of %d)",
                    result.variant,
                    result.seed,
                    100 * result.within_km[200],
                    len(results),
                    len(variants) * len(seeds),
                )
    finally:
        # An error is told at once: not after all that waits is done, nor after what still runs, which is kept.
        pool.shutdown(wait=False, cancel_futures=True)
    return [results[variant.name, seed] for variant in variants for seed in seeds]


def _begin(log_level: int) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=max(log_level, logging.WARNING))


def _measure(recipe: Recipe, variant: Variant, seed: int, directory: Path, views: int) -> Result:
    varied, run = apply(recipe, variant, seed), directory / variant.name / str(seed)
    file = run / RESULT_FILE
    claim_run(varied, run)
    if file.exists():
        return _read(file, views)
    begun = time.perf_counter()
    if variant.built_by == "training":
        fit(varied, run)
        bundle = build(varied, run)
    else:
        base = directory / BASE / str(seed)
        bundle = _build_prototypes(bundle_path(apply(recipe, Variant(BASE, "", {}), seed), base), variant, seed, run)
    # Every leaf is scored, so that no variant gains or loses by the width of a beam.
    options = EvaluationOptions(exact=True, point_estimator="leaf")
    evaluation = evaluate_views(bundle, views=views, seed=VIEWS_SEED, options=options)
    manifest = read_manifest(bundle)
    assert manifest.encoder is not None  # both ways of building store it
    result = Result(
        variant.name,
        seed,
        {distance: share.value for distance, share in evaluation.figures.within_km.items()},
        evaluation.figures.median_km.value,
        tuple(level.cells for level in manifest.levels),
        manifest.encoder.parameters,
        round(time.perf_counter() - begun, 1),
    )
    with written_aside(file) as aside:
        aside.write_text(json.dumps({**asdict(result), "views": views}, indent=2) + "\n")
    return result


def _build_prototypes(encoder_bundle: Path, variant: Variant, seed: int, run: Path) -> Path:
    encoder, manifest = open_encoder(encoder_bundle)
    # Views that the encoder was not trained on.
    views = ViewPictures(encoder.image_size, PROTOTYPE_VIEWS, _PROTOTYPE_SEED + seed)
    about, training = about_pictures(views, manifest)
    options = PrototypeOptions(shrink=variant.built_by == "shrunken means", seed=seed)
    return build_prototypes(views, encoder, run / variant.name, about=about, training=training, options=options).path


def _read(file: Path, views: int) -> Result:
    try:
        fields = json.loads(file.read_text())
        measured_on = fields.pop("views")
        within_km = {int(distance): share for distance, share in fields["within_km"].items()}
        result = Result(**{**fields, "within_km": within_km, "cells": tuple(fields["cells"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{file} is damaged ({error}); remove it, and it is measured again") from error
    if measured_on != views:
        raise ConfigurationError(
            f"{file} was measured on {measured_on} views, not {views}; remove it, or ask for these"
        )
    return result
