"""Measure what a server needs of its machine.

    python tests/benchmarks/sizing.py [--json] [--index DIR] [--images N]

A server process is started on a store with two copies of the bundle, which therefore share their encoder. It is idle
first, then locates the sample views for as many clients as it admits, then loads the second version.

Computed from the manifest, as the server does before it loads a version:

- ``bundle_mb``: the bundle's files, and so the most that a load keeps in the scratch directory.
- ``index_mb``: what a version adds when its encoder is shared: files other than the encoder's, and the leaves decoded
  to float32, for exact searches.
- ``encoder_mb``: what it adds otherwise, too: four bytes a parameter.

Measured, with memory as the resident set of the process:

- ``resident_ready_mb``, ``resident_busy_mb``: after the start, and the most under load.
- ``second_version_mb``: what loading the second version added.
- ``scratch_held_mb``: files without a name that stay on the scratch directory's disk while the version is in memory.
- ``open_files``, ``threads``: of an idle server with one version and no connection.
- ``cpu_ms_per_image``: processor time of the server, under load.
- ``decode_ms_per_image``, ``encode_ms_per_image``, ``search_ms_per_image``: time in each stage, which overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from geosurge import store as stores
from geosurge.bundle import read_manifest
from geosurge.bundle.manifest import ENCODER_DIRECTORY, Manifest
from geosurge.client import Client
from geosurge.commands.demo_steps import default_views
from geosurge.settings import ServerSettings

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import ServerProcess, index_client, server_process

MB = 1e6
FIRST, SECOND = "first", "second"
STAGES = ("decode", "encode", "search")
_PATIENCE_SECONDS = 1800.0
"""A large encoder takes seconds an image on a CPU, and each waits for all others."""


def manifest_sizes(manifest: Manifest) -> dict[str, float]:
    """What can be said of a bundle without opening it; see the module."""
    encoder_files = {name for name in manifest.files if name.startswith(f"{ENCODER_DIRECTORY}/")}
    index = sum(info.size for name, info in manifest.files.items() if name not in encoder_files)
    parameters = 0 if manifest.encoder is None else manifest.encoder.parameters
    return {
        "bundle_mb": sum(info.size for info in manifest.files.values()) / MB,
        "index_mb": (index + 4 * manifest.levels[-1].cells * manifest.dimension) / MB,
        "encoder_mb": 4 * parameters / MB,
    }


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def stage_seconds(server: ServerProcess) -> dict[str, float]:
    return {stage: server.metric("geosurge_stage_seconds_sum", stage=stage) for stage in STAGES}


def peak_resident_mb(process: psutil.Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / MB


def held_mb(process: psutil.Process, scratch: Path) -> float:
    """Files of the scratch directory that are mapped, though they have no name any more."""
    ends: dict[str, int] = {}
    for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
        if str(scratch) in line:
            addresses, _, offset, _, inode = line.split()[:5]
            start, end = (int(address, 16) for address in addresses.split("-"))
            ends[inode] = max(ends.get(inode, 0), int(offset, 16) + end - start)
    return sum(ends.values()) / MB


def measure(bundle: Path, images: int) -> dict[str, float]:
    """Runs the server; see the module."""
    settings = ServerSettings()
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        for name in (FIRST, SECOND):
            stores.publish(store, bundle, name=name, verify=False, activate=name == FIRST)
        with server_process(
            store, environment=os.environ, decode_workers=settings.decode_workers, log_level="warning"
        ) as server:
            process = psutil.Process(server.process.pid)
            results = {
                "resident_ready_mb": server.resident_bytes() / MB,
                "scratch_held_mb": held_mb(process, server.scratch),
                "open_files": process.num_fds(),
                "threads": process.num_threads(),
            }
            pictures = [path.read_bytes() for path in sorted(default_views().glob("*.jpg"))]
            clients = settings.max_concurrent_requests
            with (
                Client(server.address, timeout_seconds=_PATIENCE_SECONDS) as client,
                ThreadPoolExecutor(clients) as pool,
            ):
                before, cpu_before = stage_seconds(server), cpu_seconds(process)
                list(pool.map(client.locate, (pictures[number % len(pictures)] for number in range(images))))
                cpu_after, after = cpu_seconds(process), stage_seconds(server)
            results["resident_busy_mb"] = peak_resident_mb(process)
            results["cpu_ms_per_image"] = 1000 * (cpu_after - cpu_before) / images
            for stage in STAGES:
                results[f"{stage}_ms_per_image"] = 1000 * (after[stage] - before[stage]) / images
            resident = server.resident_bytes()
            with index_client(server) as index:
                index.load(SECOND)
                while index.version(SECOND).state == "loading":
                    time.sleep(0.05)
                if index.version(SECOND).state != "ready":
                    raise SystemExit("the second version was not loaded")
            results["second_version_mb"] = (server.resident_bytes() - resident) / MB
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--index", type=Path, default=stores.default_store(), help="store or bundle")
    parser.add_argument("--images", type=int, default=512, help="images to locate under load")
    arguments = parser.parse_args()
    bundle = stores.resolve_bundle(arguments.index)
    sizes = manifest_sizes(read_manifest(bundle))
    results = {name: round(value, 1) for name, value in {**sizes, **measure(bundle, arguments.images)}.items()}
    if arguments.json:
        sys.stdout.write(json.dumps(results) + "\n")
        return
    table = Table("", "value")
    for name, value in results.items():
        table.add_row(name, f"{value:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
