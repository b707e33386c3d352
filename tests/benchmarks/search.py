"""Time the beam, the exact scan and the dense seven-level product side by side at GeoSURGE's published sizes.

    python tests/benchmarks/search.py [--json] [--device cpu|cuda] [--storage fp32|fp16|sq8] [--width W] [--repeats N]

**Data.** 684, 1744, 3298, 7202, 12893, 16150 and 21673 cells of 768 dimensions, random but hierarchical: a cell's
embedding is its parent's plus a shorter random vector, made unit again. A query is the embedding of a random leaf plus
noise, made unit again, with so much noise that the exact search finds that leaf for 70 to 90 % of the queries (printed
as ``exact_accuracy``). Otherwise every method would find the same obvious leaf, and agreement would say nothing.

**Methods**, each answering with the ten best leaves of each query:

- ``dense``: a softmax over all cells of each level, probabilities multiplied down the tree, top ten leaves; written
  once in numpy and once in torch, and on a CPU the faster of the two is reported for each batch size. On a GPU it is
  torch's, with all embeddings on that GPU;
- ``exact``: `HierarchicalIndex.exact`, one inner product with every leaf's composite;
- ``beam``: `HierarchicalIndex.search`. On a GPU its indexes are FAISS's clones, and every level a preassigned search.

On a GPU, all of them take queries from the host's memory and leave their answers there, so that the copies and the wait
for the device are in their times, and all compute in float32 (TF32 is off, PyTorch's default).

**Timing.** Milliseconds a query (the time of a batch over its size): medians over all rounds. In every round each
method has its turn: a pause in which the threads of the method before it fall asleep, one call that is not counted,
then several that are, each with other queries. So whatever else the machine does falls on all methods alike: compare
ratios, not runs.

**Agreement**, over all queries and against ``exact``: ``top1_agreement`` is the share with the same best leaf,
``recall_at_10`` the share of the ten best leaves found. ``dense_agreement``, the share of queries for which the dense
product has the same best leaf as ``exact``, shows that both rank by the same score.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from geosurge.search import HierarchicalIndex
from geosurge_training.building.indexing import composite_embeddings, write_level_indexes

CELL_COUNTS = (684, 1744, 3298, 7202, 12893, 16150, 21673)
DIMENSION = 768
TEMPERATURE = 0.07
CALLS_A_TURN = {1: 50, 32: 4, 256: 2}
"""Counted calls of each batch size; short calls need more of them for a steady median."""
PAUSE_S = 0.05
QUERIES = 1024
TOP = 10
SPREAD = 0.35
"""Length of the random step from a parent to its child."""
NOISE = 4.7
"""Length of the noise of a query, whose leaf has length 1."""

Vectors: TypeAlias = list[NDArray[np.float32]]
Answer: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.int64]]


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_steps(n: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return unit(rng.standard_normal((n, DIMENSION), dtype=np.float32))


def hierarchical_embeddings(rng: np.random.Generator) -> tuple[Vectors, list[NDArray[np.int64]]]:
    """Geographic embeddings and parents of each level; every cell has at least one child."""
    embeddings = [random_steps(CELL_COUNTS[0], rng)]
    parents = [np.full(CELL_COUNTS[0], -1, np.int64)]
    for above, here in itertools.pairwise(CELL_COUNTS):
        parents.append(np.sort(np.r_[np.arange(above), rng.integers(0, above, here - above)]))
        embeddings.append(unit(embeddings[-1][parents[-1]] + SPREAD * random_steps(here, rng)))
    return embeddings, parents


def dense_numpy(embeddings: Vectors, parents: list[NDArray[np.int64]]) -> Answer:
    def answer(queries: NDArray[np.float32]) -> NDArray[np.int64]:
        product = np.ones((len(queries), 1), np.float32)
        for cells, above in zip(embeddings, parents, strict=True):
            logits = queries @ cells.T
            logits /= TEMPERATURE
            logits -= logits.max(axis=1, keepdims=True)
            np.exp(logits, out=logits)
            logits /= logits.sum(axis=1, keepdims=True)
            logits *= product.take(np.maximum(above, 0), axis=1)
            product = logits
        best = np.argpartition(product, -TOP, axis=1)[:, -TOP:]
        order = np.argsort(-np.take_along_axis(product, best, axis=1), axis=1)
        return np.take_along_axis(best, order, axis=1)

    return answer


def dense_torch(embeddings: Vectors, parents: list[NDArray[np.int64]], device: str) -> Answer:
    cells = [torch.from_numpy(rows).to(device) for rows in embeddings]
    above = [torch.from_numpy(rows).clamp(min=0).to(device) for rows in parents]

    @torch.inference_mode()
    def answer(queries: NDArray[np.float32]) -> NDArray[np.int64]:
        images = torch.from_numpy(queries).to(device)
        product = torch.ones((len(queries), 1), device=device)
        for level_cells, level_above in zip(cells, above, strict=True):
            probabilities = torch.softmax((images @ level_cells.T).div_(TEMPERATURE), dim=1)
            product = probabilities.mul_(product.index_select(1, level_above))
        return product.topk(TOP, dim=1).indices.cpu().numpy()

    return answer


def median_ms(
    methods: dict[str, Answer], queries: NDArray[np.float32], batch: int, calls: int, rounds: int
) -> dict[str, float]:
    """Milliseconds a query of each method."""
    starts = itertools.cycle(range(0, len(queries) - batch + 1, batch))
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        parts = [queries[start : start + batch] for start in itertools.islice(starts, calls + 1)]
        for name, answer in methods.items():
            time.sleep(PAUSE_S)
            for number, part in enumerate(parts):
                begin = time.perf_counter()
                answer(part)
                if number > 0:
                    times[name].append(time.perf_counter() - begin)
    return {name: 1000 * statistics.median(values) / batch for name, values in times.items()}


def in_batches(answer: Answer, queries: NDArray[np.float32], batch: int) -> NDArray[np.int64]:
    return np.concatenate([answer(queries[start : start + batch]) for start in range(0, len(queries), batch)])


def measure(device: str, storage: str, width: int, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    embeddings, parents = hierarchical_embeddings(rng)
    truth = rng.integers(0, CELL_COUNTS[-1], QUERIES)
    queries = unit(embeddings[-1][truth] + np.float32(NOISE) * random_steps(QUERIES, rng))
    with tempfile.TemporaryDirectory() as directory:
        composites = composite_embeddings(embeddings, [TEMPERATURE] * len(CELL_COUNTS), parents)
        paths = write_level_indexes(Path(directory), composites, parents, storage)
        del composites
        with HierarchicalIndex.open(paths, device) as index:
            # What runs on another device is no measure for this one.
            dense_methods = {"torch": dense_torch(embeddings, parents, device)}
            if index.device == "cpu":
                dense_methods["numpy"] = dense_numpy(embeddings, parents)
            methods: dict[str, Answer] = {
                **dense_methods,
                "exact": lambda part: index.exact(part, k=TOP).ordinals,
                "beam": lambda part: index.search(part, width=width, k=TOP).ordinals,
            }
            expected = in_batches(methods["exact"], queries, max(CALLS_A_TURN))
            dense = in_batches(methods["torch"], queries, max(CALLS_A_TURN))
            rows = []
            for batch, calls in CALLS_A_TURN.items():
                ms = median_ms(methods, queries, batch, calls, repeats)
                found = in_batches(methods["beam"], queries, batch)
                fastest = min(dense_methods, key=ms.__getitem__)
                shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
                rows.append(
                    {
                        "batch": batch,
                        "dense_ms": ms[fastest],
                        "dense_by": fastest,
                        "exact_ms": ms["exact"],
                        "beam_ms": ms["beam"],
                        "beam_width": width,
                        "top1_agreement": float((found[:, 0] == expected[:, 0]).mean()),
                        "recall_at_10": sum(shared) / expected.size,
                    }
                )
    return {
        "rows": rows,
        "exact_accuracy": float((expected[:, 0] == truth).mean()),
        "dense_agreement": float((dense[:, 0] == expected[:, 0]).mean()),
        "queries": QUERIES,
        "device": device if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})",
        "storage": storage,
        "threads": {"faiss": faiss.omp_get_max_threads(), "torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "versions": {"faiss": faiss.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    title = f"milliseconds a query on {report['device']}, {report['storage']} lists"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1), title_justify="left")
    for heading in ("batch", "dense", "by", "exact", "beam", "width", "ratio", "top-1", "recall@10"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(
            str(row["batch"]),
            f"{row['dense_ms']:.3f}",
            row["dense_by"],
            f"{row['exact_ms']:.3f}",
            f"{row['beam_ms']:.3f}",
            str(row["beam_width"]),
            f"{row['dense_ms'] / row['beam_ms']:.1f}",
            f"{row['top1_agreement']:.4f}",
            f"{row['recall_at_10']:.4f}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"The exact search finds the true leaf of {report['exact_accuracy']:.1%} of {report['queries']} queries; "
        f"the dense product has the same best leaf for {report['dense_agreement']:.2%}.\n"
        f"Threads: {report['threads']}. Versions: {report['versions']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--storage", choices=["fp32", "fp16", "sq8"], default="fp16", help="of the deeper levels")
    parser.add_argument("--width", type=int, default=32, help="width of the beam")
    parser.add_argument("--repeats", type=int, default=8, help="rounds")
    arguments = parser.parse_args()
    report = measure(arguments.device, arguments.storage, arguments.width, arguments.repeats)
    if arguments.json:
        json.dump(report, sys.stdout)
        print()
    else:
        show(report)


if __name__ == "__main__":
    main()
