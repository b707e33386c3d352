"""Time a server against the bare engine: what gRPC, queues and threads cost.

    python tests/benchmarks/serving.py [--json] [--index DIR] [--rounds N] [--swap]

A server process and this one, which is the client, share the machine. In every round each measurement has its turn, the
bare one and the served one of a pair right after each other (lone requests in turns of a few), so that what else the
machine does falls on both: compare ratios, not runs. Reported are medians over the rounds, or turns.

- ``throughput_ratio``: images a second that 16 concurrent clients get over gRPC, divided by what `Locator.locate` does
  with the same images in this process in batches of the server's largest size.
- ``added_latency_ms``: latency of a request that is alone, less the time of `Locator.locate` of one image.
- ``embedding_queries_per_s``: embeddings answered in one stream.
- ``swap.*`` (with ``--swap``; in JSON both as an object and by these names): for a minute 16 clients ask without pause,
  for images and embeddings, while once a second the server loads and activates the other of two versions with one
  encoder, and unloads the one before. ``failed_calls`` counts calls without an answer and answers that are not wholly
  one version's; ``p99_ratio`` is the 99th percentile of the latencies over that of the same clients before the swaps;
  ``memory_growth`` the part by which the server's resident memory grew over the swaps after the first ten.

Images are the sample views of `tests/data/views`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from geosurge import store as stores
from geosurge.client import Client
from geosurge.commands.demo_steps import default_views, server_process
from geosurge.location import Location
from geosurge.locator import Locator

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.traffic import swap_under_load

CLIENTS = 16
IMAGES_A_ROUND = 384
LONE_REQUESTS = 12
LONE_REQUESTS_NOT_COUNTED = 3
LONE_TURNS_A_ROUND = 8
EMBEDDINGS_A_ROUND = 3000
SWAP_EMBEDDINGS = 24
SWAP_SECONDS = 60.0
QUIET_SECONDS = 20.0


def seconds_of(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def checked(answers: list[Any]) -> None:
    """Ends the benchmark when anything was not answered: a refusal is fast."""
    for answer in answers:
        if not isinstance(answer, Location):
            raise SystemExit(f"not answered: {answer!r}")


def locate_bare(locator: Locator, images: list[bytes], batch_size: int) -> None:
    checked(locator.locate(images, batch_size=batch_size))


def locate_served(clients: list[Client], pool: ThreadPoolExecutor, images: list[bytes]) -> None:
    def ask(number: int) -> list[Location]:
        return [clients[number].locate(image) for image in images[number :: len(clients)]]

    for answers in pool.map(ask, range(len(clients))):
        checked(answers)


def lone_latency_ms(locate: Callable[[bytes], object], images: list[bytes]) -> float:
    """Median of one turn; its first requests do not count, because the other side's threads may still be spinning."""
    latencies = [1000 * seconds_of(lambda image=image: locate(image)) for image in images]  # type: ignore[misc]
    return statistics.median(latencies[LONE_REQUESTS_NOT_COUNTED:])


def query_embeddings(locator: Locator, images: list[bytes], count: int) -> NDArray[np.float32]:
    """What the encoder makes of the images, with a little noise so that no two are the same."""
    encoded = locator.encode(np.stack([locator.preprocess(image) for image in images]))
    noise = np.random.default_rng(0).standard_normal((count, encoded.shape[1])) / np.sqrt(encoded.shape[1])
    return (encoded[np.arange(count) % len(encoded)] + 0.1 * noise).astype(np.float32)


def measure(index: Path, rounds: int) -> dict[str, Any]:
    images = [path.read_bytes() for path in sorted(default_views().glob("*.jpg"))]
    many = [images[number % len(images)] for number in range(IMAGES_A_ROUND)]
    few = many[:LONE_REQUESTS]
    ratios, bare_rates, served_rates, added, rates = [], [], [], [], []
    with Locator.open(index) as locator, server_process(index) as address, ThreadPoolExecutor(CLIENTS) as pool:
        clients = [Client(address) for _ in range(CLIENTS)]
        batch_size = clients[0].get_info().max_batch_size
        embeddings = query_embeddings(locator, images, EMBEDDINGS_A_ROUND)
        locate_bare(locator, many, batch_size)
        locate_served(clients, pool, many)
        for _ in range(rounds):
            bare = seconds_of(lambda: locate_bare(locator, many, batch_size))
            served = seconds_of(lambda: locate_served(clients, pool, many))
            ratios.append(bare / served)
            bare_rates.append(len(many) / bare)
            served_rates.append(len(many) / served)
            for _ in range(LONE_TURNS_A_ROUND):
                alone_bare = lone_latency_ms(lambda image: locator.locate([image]), few)
                added.append(lone_latency_ms(clients[0].locate, few) - alone_bare)
            stream = seconds_of(lambda: checked(list(clients[0].locate_many(embeddings, window=256))))
            rates.append(len(embeddings) / stream)
        for client in clients:
            client.close()
    return {
        "throughput_ratio": statistics.median(ratios),
        "bare_images_per_s": statistics.median(bare_rates),
        "served_images_per_s": statistics.median(served_rates),
        "added_latency_ms": statistics.median(added),
        "embedding_queries_per_s": statistics.median(rates),
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
    }


def measure_swaps(index: Path) -> dict[str, Any]:
    images = [path.read_bytes() for path in sorted(default_views().glob("*.jpg"))]
    with Locator.open(index) as locator:
        embeddings = list(query_embeddings(locator, images, SWAP_EMBEDDINGS))
    names = ("one", "two")
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        for name in names:
            stores.publish(store, index, name=name, activate=name == names[-1])
        report = swap_under_load(
            store, names, CLIENTS, SWAP_SECONDS, quiet_seconds=QUIET_SECONDS, queries=[*images, *embeddings]
        )
    return {
        "failed_calls": report.failed_calls + report.inconsistent,
        "calls": report.calls,
        "swaps": report.swaps,
        "p99_ratio": report.p99_with_ms / report.p99_without_ms,
        "p99_ms": report.p99_with_ms,
        "memory_growth": report.rss_growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--index", type=Path, default=stores.default_store(), help="bundle or store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--swap", action="store_true", help="also swap versions under load, for a minute and a half")
    arguments = parser.parse_args()
    bundle = stores.resolve_bundle(arguments.index)
    report = measure(bundle, arguments.rounds)
    swap = measure_swaps(bundle) if arguments.swap else {}
    report |= {f"swap.{name}": value for name, value in swap.items()}
    if arguments.json:
        json.dump(report | ({"swap": swap} if swap else {}), sys.stdout)
        print()
        return
    table = Table(show_header=False)
    for name, value in report.items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(value))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
