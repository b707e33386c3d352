"""Small, valid index bundles from random embeddings over real S2 cells."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from support.backbones import CLASS_COUNT, RESNET, SEGFORMER

from geosurge import geodesy, s2
from geosurge import store as stores
from geosurge.bundle import finish_bundle
from geosurge.bundle.golden import record_golden_queries
from geosurge.bundle.manifest import (
    ENCODER_DIRECTORY,
    GOLDEN_DIRECTORY,
    CalibrationInfo,
    Domain,
    EncoderInfo,
    GoldenImage,
    LevelInfo,
    Manifest,
    encode_embedding,
    installed_library_versions,
)
from geosurge.cells import CellRows, CellTree, write_cell_tree
from geosurge.encoder import EncoderConfig, FusionConfig, ImageEncoder, SegmentationConfig, VisionConfig
from geosurge.location import Place
from geosurge.search import HierarchicalIndex
from geosurge_training.building.indexing import composite_embeddings, write_level_indexes

CREATE_TIME = datetime(2025, 3, 1, 12, 0, tzinfo=UTC)
BEAM_WIDTH = 8

BUNDLE_FILES = [
    "cells.lmdb/data.mdb",
    "encoder/config.json",
    "encoder/model.safetensors",
    "golden/1.png",
    "level-1.faiss",
    "level-2.faiss",
    "level-3.faiss",
]
"""Files of a bundle of three levels with an encoder and one golden image, less the manifest."""

_CITIES = (
    (Place("Nairobi", "Nairobi Area", "Kenya", "KE", 0.0), -1.28333, 36.81667),
    (Place("Windhoek", "Khomas", "Namibia", "NA", 0.0), -22.55941, 17.08323),
    (Place("Lisbon", "Lisbon", "Portugal", "PT", 0.0), 38.71667, -9.13333),
    (Place("Auckland", "Auckland", "New Zealand", "NZ", 0.0), -36.84853, 174.76349),
    (Place("Lima", "Lima Province", "Peru", "PE", 0.0), -12.04318, -77.02824),
)


def make_levels(
    level_counts: Sequence[int] = (4, 9, 20), *, seed: int = 0
) -> tuple[list[CellRows], list[NDArray[np.uint64]]]:
    """Rows and cell ids of random nested S2 cells; a cell with one child stands on the next level again itself."""
    rng = np.random.default_rng(seed)
    first = np.arange(6 * 4**2) if level_counts[0] <= 6 * 4**2 else np.arange(6 * 4**5)
    shift = 57 if level_counts[0] <= 6 * 4**2 else 51
    chosen = np.sort(rng.choice(first, level_counts[0], replace=False)).astype(np.uint64)
    half = np.uint64(1 << (shift - 1))
    ids = [(chosen << np.uint64(shift)) | half]
    parents = [np.full(level_counts[0], -1, np.int64)]
    for count in level_counts[1:]:
        children = np.ones(len(ids[-1]), np.int64)
        np.add.at(children, rng.integers(0, len(children), count - len(children)), 1)
        ids.append(np.concatenate([_descendants(rng, cell, k) for cell, k in zip(ids[-1], children, strict=True)]))
        parents.append(np.repeat(np.arange(len(children)), children))
    counts = [rng.integers(50, 500, level_counts[-1])]
    for above in reversed(parents[1:]):
        counts.insert(0, np.bincount(above, weights=counts[0]).astype(np.int64))
    rows = [_rows(rng, cells, above, samples) for cells, above, samples in zip(ids, parents, counts, strict=True)]
    return rows, ids


def geographic_embeddings(
    parents: Sequence[NDArray[np.int64]], dimension: int, *, seed: int = 0
) -> list[NDArray[np.float32]]:
    """Random unit rows for each level, a child near its parent."""
    rng = np.random.default_rng(seed + 1)
    levels: list[NDArray[np.float32]] = []
    for level, above in enumerate(parents):
        vectors = rng.standard_normal((len(above), dimension))
        if level:
            vectors = levels[-1][above] + 0.5 * vectors / np.sqrt(dimension)
        levels.append((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))
    return levels


def tiny_encoder(*, dimension: int = 16, seed: int = 0) -> ImageEncoder:
    """An encoder with random weights over 32-pixel images, which embeds one in a millisecond or two."""
    torch.manual_seed(seed)
    config = EncoderConfig(
        vision=VisionConfig(backbone=RESNET, image_size=32),
        segmentation=SegmentationConfig(backbone=SEGFORMER, image_size=32, class_count=CLASS_COUNT),
        fusion=FusionConfig(dimension=dimension, width=16, latent_width=8, heads=2, blocks=1),
    )
    return ImageEncoder(config).eval()


def make_bundle(
    directory: Path,
    *,
    seed: int = 0,
    level_counts: Sequence[int] = (4, 9, 20),
    dimension: int = 16,
    encoder: ImageEncoder | None = None,
    name: str = "tiny",
    create_time: datetime = CREATE_TIME,
    storage: Literal["fp32", "fp16", "sq8"] = "fp32",
    point_estimator: Literal["leaf", "posterior_mean"] = "leaf",
    calibration_temperature: float = 1.0,
) -> Path:
    """Builds a bundle in ``directory``, which is made; its leaf embeddings are `geographic_embeddings`' last level.

    Without an encoder the bundle answers embeddings of ``dimension`` values; with one, its dimension counts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dimension = dimension if encoder is None else encoder.dimension
    rows, ids = make_levels(level_counts, seed=seed)
    parents = [level.parents for level in rows]
    geographic = geographic_embeddings(parents, dimension, seed=seed)
    temperatures = tuple(np.linspace(0.2, 0.07, len(level_counts)).tolist())
    paths = write_level_indexes(directory, composite_embeddings(geographic, temperatures, parents), parents, storage)
    write_cell_tree(directory / "cells.lmdb", rows)

    rng = np.random.default_rng(seed + 2)
    queries = geographic[-1][rng.integers(0, level_counts[-1], 3)]
    queries = queries + (0.1 * rng.standard_normal(queries.shape)).astype(np.float32)
    queries = np.ascontiguousarray(queries / np.linalg.norm(queries, axis=1, keepdims=True), np.float32)
    with CellTree.open(directory / "cells.lmdb") as tree, HierarchicalIndex.open(paths) as index:
        golden_queries = record_golden_queries(tree, index, queries, width=BEAM_WIDTH, k=5)

    encoder_info, golden_images = (None, ()) if encoder is None else _add_encoder(directory, encoder, rng)
    s2_levels = [s2.cell_id_to_s2_level(cells) for cells in ids]
    manifest = Manifest(
        name=name,
        create_time=create_time,
        description="Random embeddings over random cells, for tests.",
        domain=Domain(can="nothing", cannot="anything", training="none: random numbers"),
        levels=tuple(
            LevelInfo(
                level=number,
                cells=count,
                file=path.name,
                storage=storage if number > 1 else "fp32",
                s2_level_min=int(s2.min()),
                s2_level_max=int(s2.max()),
            )
            for number, (count, path, s2) in enumerate(zip(level_counts, paths, s2_levels, strict=True), start=1)
        ),
        dimension=dimension,
        temperatures=temperatures,
        default_beam_width=BEAM_WIDTH,
        point_estimator=point_estimator,
        encoder=encoder_info,
        calibration=CalibrationInfo(
            temperature=calibration_temperature,
            confidence_levels=(0.0, 0.5, 0.9, 1.0),
            posterior_masses=(0.0, 0.5, 0.9, 1.0),
            expected_calibration_error=0.0,
            sample_count=1,
            source="none: the identity",
        ),
        library_versions=installed_library_versions(),
        golden_queries=golden_queries,
        golden_images=golden_images,
    )
    finish_bundle(directory, manifest)
    return directory


def make_store(store: Path, encoders: Mapping[str, ImageEncoder | None]) -> Path:
    """Publishes a version for each name, no two alike, with its encoder; the first one is active."""
    for seed, (name, encoder) in enumerate(encoders.items()):
        with tempfile.TemporaryDirectory() as directory:
            source = make_bundle(Path(directory), seed=seed, name=name, encoder=encoder)
            stores.publish(store, source, activate=seed == 0)
    return store


def _descendants(rng: np.random.Generator, cell: np.uint64, count: int) -> NDArray[np.uint64]:
    """``count`` cells inside a cell, in Hilbert order; one cell is the cell itself."""
    cells = np.array([cell])
    while len(cells) < count:
        cells = s2.cell_id_to_children(cells).ravel()
    return cells[np.sort(rng.choice(len(cells), count, replace=False))]


def _rows(
    rng: np.random.Generator, cells: NDArray[np.uint64], parents: NDArray[np.int64], samples: NDArray[np.int64]
) -> CellRows:
    lowest, _ = s2.cell_id_range(cells)
    steps = (cells - lowest).astype(np.float64)  # Half the width of the range of leaf ids under a cell.
    inside = lowest + np.uint64(2) * (rng.random(len(cells)) * steps).astype(np.uint64)
    latitude, longitude = s2.cell_id_to_center(inside)
    area = s2.cell_id_to_area_km2(cells)
    return CellRows(
        tokens=s2.cell_id_to_token(cells),
        parents=parents,
        mean_latitude_deg=latitude,
        mean_longitude_deg=longitude,
        spread_km=np.sqrt(area) / 4,
        area_km2=area,
        sample_counts=samples.astype(np.int64),
        outlines=list(s2.cell_id_to_outline(cells)),
        s2_levels=s2.cell_id_to_s2_level(cells),
        places=[_place(latitude[row], longitude[row]) for row in range(len(cells))],
    )


def _place(latitude_deg: float, longitude_deg: float) -> Place:
    distances = [
        float(geodesy.great_circle_km(latitude_deg, longitude_deg, latitude, longitude))
        for _, latitude, longitude in _CITIES
    ]
    nearest = int(np.argmin(distances))
    city = _CITIES[nearest][0]
    return Place(city.city, city.region, city.country, city.country_code, distances[nearest])


def _add_encoder(
    directory: Path, encoder: ImageEncoder, rng: np.random.Generator
) -> tuple[EncoderInfo, tuple[GoldenImage, ...]]:
    encoder.save(directory / ENCODER_DIRECTORY)
    noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8), "RGB")
    content = io.BytesIO()
    noise.resize((96, 72), Image.Resampling.BICUBIC).save(content, "PNG")
    file = directory / GOLDEN_DIRECTORY / "1.png"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content.getvalue())
    embedding = encoder.encode(encoder.preprocessing.decode(content.getvalue())[None])[0]
    info = EncoderInfo(
        sha256=encoder.fingerprint,
        preprocessing_id=encoder.preprocessing.id,
        vision=type(encoder.vision).__name__,
        segmentation=type(encoder.segmenter).__name__,
        parameters=sum(encoder.parameter_counts().values()),
    )
    return info, (GoldenImage(file=f"{GOLDEN_DIRECTORY}/1.png", embedding=encode_embedding(embedding)),)
