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
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from geosurge import store as stores
from geosurge.bundle import ENCODER_DIRECTORY, read_manifest
from geosurge.client import Client
from geosurge.demo import default_views
from geosurge.index_client import IndexClient
from geosurge.manifest import Manifest
from geosurge.settings import ServerSettings

MB = 1e6
FIRST, SECOND = "first", "second"
_ANNOUNCED = re.compile(r"^serving .* on (\S+:\d+), monitoring on (\S+:\d+)$")


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


@dataclass(frozen=True)
class Running:
    """A server process, and where it listens."""

    process: psutil.Process
    address: str
    metrics_address: str
    scratch: Path

    def resident_mb(self) -> float:
        return float(self.process.memory_info().rss) / MB

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def stage_seconds(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=30) as page:
            families = text_string_to_metric_families(page.read().decode())
        samples = [sample for family in families for sample in family.samples]
        return {s.labels["stage"]: s.value for s in samples if s.name == "geosurge_stage_seconds_sum"}

    def peak_resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / MB

    def held_mb(self) -> float:
        """Files of the scratch directory that are mapped, though they have no name any more."""
        ends: dict[str, int] = {}
        for line in Path(f"/proc/{self.process.pid}/maps").read_text().splitlines():
            if str(self.scratch) in line:
                addresses, _, offset, _, inode = line.split()[:5]
                start, end = (int(address, 16) for address in addresses.split("-"))
                ends[inode] = max(ends.get(inode, 0), int(offset, 16) + end - start)
        return sum(ends.values()) / MB


@contextmanager
def running_server(store: Path, scratch: Path) -> Iterator[Running]:
    command = [sys.executable, "-m", "geosurge.cli", "serve", "--index", str(store), "--scratch", str(scratch)]
    command += ["--port", "0", "--metrics-port", "0", "--log-level", "warning"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = next((match for line in process.stderr if (match := _ANNOUNCED.match(line.rstrip()))), None)
            if found is None:
                raise SystemExit("the server did not start")
            yield Running(psutil.Process(process.pid), found[1], found[2], scratch)
        finally:
            process.terminate()
            process.communicate()


def measure(bundle: Path, images: int) -> dict[str, float]:
    """Runs the server; see the module."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store, scratch = directory / "store", directory / "scratch"
        scratch.mkdir()
        for name in (FIRST, SECOND):
            stores.publish(store, bundle, name=name, verify=False, activate=name == FIRST)
        server = stack.enter_context(running_server(store, scratch))
        results = {
            "resident_ready_mb": server.resident_mb(),
            "scratch_held_mb": server.held_mb(),
            "open_files": server.process.num_fds(),
            "threads": server.process.num_threads(),
        }
        pictures = [path.read_bytes() for path in sorted(default_views().glob("*.jpg"))]
        clients = ServerSettings().max_concurrent_requests
        with Client(server.address) as client, ThreadPoolExecutor(clients) as pool:
            before, cpu_before = server.stage_seconds(), server.cpu_seconds()
            list(pool.map(client.locate, (pictures[number % len(pictures)] for number in range(images))))
            cpu_seconds, after = server.cpu_seconds() - cpu_before, server.stage_seconds()
        results["resident_busy_mb"] = server.peak_resident_mb()
        results["cpu_ms_per_image"] = 1000 * cpu_seconds / images
        for stage in ("decode", "encode", "search"):
            results[f"{stage}_ms_per_image"] = 1000 * (after[stage] - before.get(stage, 0.0)) / images
        with IndexClient(server.address) as administrator:
            resident = server.resident_mb()
            administrator.load(SECOND)
            while administrator.version(SECOND).state == "loading":
                time.sleep(0.05)
            if administrator.version(SECOND).state != "ready":
                raise SystemExit("the second version was not loaded")
            results["second_version_mb"] = server.resident_mb() - resident
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
