"""Do means that lean on their parents help cells of few pictures? Against plain means, and against no such cells.

    python tests/benchmarks/sparse_cells.py [--encoder BUNDLE_OR_STORE] [--work DIR] [--views N] [--queries N]
        [--tau-max N] [--uneven] [--json]

GeoSURGE names cells with few samples as a weakness, and what to do about them as an open question. Three indexes are
made of the same views of the Blue Marble world and with the same encoder: ``shrunken`` means, ``plain`` means, and
plain means with the ``dropped`` cells of at most five views, as a partition's tau_min does. Each has its temperatures
(the first its strength, too) fitted on the same held-out views. Other views, of a seed of their own, ask; every leaf
is scored, and the answer is the mean place of the best one. Queries are told apart by how many views the leaf that
holds them has, in the partition in which nothing is dropped; ``none`` are those in no leaf.

``--tau-max`` is that of the leaves, over five; level 1 has fifty times it, the others are in geometric order between.
``--uneven`` keeps the views of each S2 cell of S2 level 4 with a probability of its own, log-uniform between 0.02 and
1: archives are dense here and thin there. Queries stay spread evenly.

Reported with 95 % bootstrap intervals: the share of queries within 200 km, that of the right leaf, the median error,
the loss (mean negative log likelihood of the true leaf, over the queries that have one; not comparable for ``dropped``,
which has fewer leaves and no likelihood for the rest), and the differences between ``shrunken`` and ``plain`` on the
same queries, whose intervals are those of paired resamples.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from geosurge.geodesy import great_circle_km
from geosurge.s2 import latlng_to_cell_id
from geosurge_training.building.indexing import composite_embeddings
from geosurge_training.data.blue_marble import BlueMarble
from geosurge_training.evaluation.bootstrap import DEFAULT_BOOTSTRAP
from geosurge_training.partitions.interface import Partition
from geosurge_training.prototypes.about import open_encoder
from geosurge_training.prototypes.build import fit_pictures, partition_pictures
from geosurge_training.prototypes.cells import default_tau_max, partition_section
from geosurge_training.prototypes.encoding import EncodedPictures, encode_pictures
from geosurge_training.prototypes.pictures import ViewPictures
from geosurge_training.prototypes.split import PictureSplit, split_pictures

SPARSE = 5
BINS = (("none", 0, 0), ("1 to 5", 1, SPARSE), ("6 to 20", SPARSE + 1, 20), ("over 20", 21, sys.maxsize))
QUERY_SEED, THINNING_SEED = 777, 5
QUERIES_AT_ONCE = 512


@dataclass(frozen=True)
class Answers:
    """What an index says to n queries.

    Attributes:
        error_km: (n,) distance from the answer to the truth.
        is_right: (n,) whether the best leaf holds the truth.
        loss: (n,) negative log likelihood of the leaf that holds the truth; NaN where none does.
    """

    error_km: NDArray[np.float64]
    is_right: NDArray[np.bool_]
    loss: NDArray[np.float64]


@dataclass(frozen=True)
class Queries:
    """Embedded views and where they were taken."""

    embeddings: NDArray[np.float32]
    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=Path("indexes"))
    parser.add_argument("--work", type=Path, help="keeps the embeddings for the next time; default nowhere")
    parser.add_argument("--views", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=6000)
    parser.add_argument("--tau-max", type=float, default=8.0)
    parser.add_argument("--uneven", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.tau_max <= SPARSE:
        parser.error(f"--tau-max has to be over {SPARSE}: of smaller leaves, dropping the sparse ones leaves none")
    with tempfile.TemporaryDirectory() as temporary:
        report = compare(options, options.work or Path(temporary))
    if options.json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        print_report(report)


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Makes the three indexes and asks them."""
    encoder, _ = open_encoder(options.encoder)
    encoded = encode_pictures(ViewPictures(encoder.image_size, options.views, seed=1), encoder, work / "views")
    world = BlueMarble(encoder.image_size)
    parts = [
        Queries(encoder.encode(batch.pixels.numpy()), batch.latitude_deg, batch.longitude_deg)
        for batch in world.held_out(options.queries, QUERY_SEED, 256)
    ]
    queries = Queries(
        np.concatenate([part.embeddings for part in parts]),
        np.concatenate([part.latitude_deg for part in parts]),
        np.concatenate([part.longitude_deg for part in parts]),
    )
    if options.uneven:
        encoded = thinned(encoded)
    split = split_pictures(encoded, seed=1)
    tau_max = tuple(value * options.tau_max / default_tau_max(0)[-1] for value in default_tau_max(0))
    everything, without_sparse = (
        partition_pictures(encoded, split, partition_section("s2", len(split.means), tau_max, (tau_min,)))
        for tau_min in (0.5, float(SPARSE))
    )
    leaves = everything.assign(queries.latitude_deg, queries.longitude_deg)[:, -1]
    samples = np.where(leaves >= 0, everything.levels[-1].sample_counts[leaves], 0)
    answers = {
        "shrunken": answer(encoded, split, everything, queries, shrink=True),
        "plain": answer(encoded, split, everything, queries, shrink=False),
        "dropped": answer(encoded, split, without_sparse, queries, shrink=False),
    }
    bins: list[tuple[str, NDArray[np.bool_]]] = [("all", np.ones(len(samples), dtype=np.bool_))]
    bins += [(name, (samples >= low) & (samples <= high)) for name, low, high in BINS]
    return {
        "views": len(split.means),
        "leaves": {"all": everything.cell_counts[-1], "without sparse": without_sparse.cell_counts[-1]},
        "bins": [{"leaf_views": name, **figures(answers, chosen)} for name, chosen in bins if chosen.sum() > 1],
    }


def thinned(encoded: EncodedPictures) -> EncodedPictures:
    """Keeps the views of each S2 cell with a probability of its own; the others count as unusable."""
    cell_ids = latlng_to_cell_id(encoded.coordinates[:, 0], encoded.coordinates[:, 1], 4)
    _, cells = np.unique(cell_ids, return_inverse=True)
    rng = np.random.default_rng(THINNING_SEED)
    kept = rng.random(len(cells)) < np.exp(rng.uniform(np.log(0.02), 0.0, cells.max() + 1))[cells]
    return EncodedPictures(encoded.embeddings, np.where(kept[:, None], encoded.coordinates, np.nan))


def answer(
    encoded: EncodedPictures, split: PictureSplit, cells: Partition, queries: Queries, *, shrink: bool
) -> Answers:
    """Fits an index and asks it."""
    fitted = fit_pictures(encoded, split, cells, shrink=shrink)
    parents = [level.parents for level in cells.levels]
    leaf_vectors = composite_embeddings(fitted.embeddings, fitted.temperatures, parents)[-1]
    truths = cells.assign(queries.latitude_deg, queries.longitude_deg)[:, -1]
    best = np.empty(len(truths), dtype=np.int64)
    loss = np.full(len(truths), np.nan)
    for start in range(0, len(truths), QUERIES_AT_ONCE):
        rows = np.arange(start, min(start + QUERIES_AT_ONCE, len(truths)))
        scores = queries.embeddings[rows] @ leaf_vectors.T
        best[rows] = scores.argmax(axis=1)
        known = truths[rows] >= 0
        highest = scores.max(axis=1, keepdims=True)
        normaliser = highest[:, 0] + np.log(np.exp(scores - highest).sum(axis=1))
        loss[rows[known]] = normaliser[known] - scores[known, truths[rows][known]]
    leaves = cells.levels[-1]
    error_km = great_circle_km(
        leaves.mean_latitude_deg[best], leaves.mean_longitude_deg[best], queries.latitude_deg, queries.longitude_deg
    )
    return Answers(error_km, best == truths, loss)


def figures(answers: dict[str, Answers], chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """Figures of the three indexes over some of the queries, and the differences between the first two."""
    columns = {
        name: np.stack([one.error_km <= 200.0, one.is_right, np.nan_to_num(one.loss)], axis=1)[chosen].astype(float)
        for name, one in answers.items()
    }
    has_loss = {name: not np.isnan(one.loss[chosen]).any() for name, one in answers.items()}
    columns["shrunken - plain"] = columns["shrunken"] - columns["plain"]
    has_loss["shrunken - plain"] = has_loss["shrunken"]
    report: dict[str, Any] = {"queries": int(chosen.sum())}
    for name, values in columns.items():
        estimates = DEFAULT_BOOTSTRAP.estimates(values.mean(axis=0), DEFAULT_BOOTSTRAP.means(values))
        named = dict(zip(("within_200_km", "right_leaf", "loss"), estimates, strict=True))
        report[name] = {
            figure: {"value": estimate.value, "interval": estimate.interval}
            for figure, estimate in named.items()
            if figure != "loss" or has_loss[name]
        }
        if name in answers:
            errors = answers[name].error_km[chosen]
            medians = DEFAULT_BOOTSTRAP.medians(errors)[:, np.newaxis]
            (median,) = DEFAULT_BOOTSTRAP.estimates(np.array([np.median(errors)]), medians)
            report[name]["median_km"] = {"value": median.value, "interval": median.interval}
    return report


def print_report(report: dict[str, Any]) -> None:
    """Prints a table for people."""
    leaves = report["leaves"]
    title = f"{report['views']} views, {leaves['all']} leaves, {leaves['without sparse']} without sparse ones"
    table = Table(
        "views in the leaf", "queries", "means", "within 200 km", "right leaf", "median km", "loss", title=title
    )
    table.box = box.SIMPLE
    for row in report["bins"]:
        for name, values in row.items():
            if not isinstance(values, dict):
                continue
            cells = [_cell(values.get(figure)) for figure in ("within_200_km", "right_leaf", "median_km", "loss")]
            table.add_row(row["leaf_views"], str(row["queries"]), name, *cells)
    Console(width=150).print(table)


def _cell(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return ""
    low, high = estimate["interval"]
    digits = 1 if abs(estimate["value"]) >= 10 else 3
    return f"{estimate['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
