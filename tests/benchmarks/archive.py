"""Speed and memory of a bulk run.

    python tests/benchmarks/archive.py [--json] [--index DIR] [--encoder full] [--device cpu|cuda] [--pictures N]
        [--rounds N] [--no-memory]

With ``--encoder full``, the paper's encoder (CLIP ViT-L/14 at 336 pixels and OneFormer Swin-L, with random weights)
stands in for the index's, which may be a thousandth of it; the search is the index's. It takes seconds a picture on a
CPU: ask for few.

All rates are taken in one run, in rounds in which each has its turn; ratios are medians over the rounds. Pictures are
views with noise, as JPEG of 12 megapixels and of 0.15; no two files are the same.

- ``large.*``, ``small.*``: pictures a second of a whole run (plan, decoding processes, encoder, search, ledger, rows;
  the index is open already), against
  ``encoder_per_s``, the bare encoder on decoded tensors, in batches of the same size;
  ``decoder_per_s``, the decoding processes alone, on the same files;
  ``loop_per_s``, a plain loop of one picture at a time.
  ``ratio_to_limit`` is the run's rate over the lower one of the first two. ``ratio_to_shared_limit`` is that over what
  is left when the encoder computes on the cores that decode (on a GPU the two do not share, and the limits are one):
  1 / (1 / encoder + 1 / decoder).
- ``peak_memory_ratio``: peak memory of the command with all its processes for 10,000 small pictures, over that for
  1,000; with the index's encoder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from geosurge.archive.backends import Backend, LocalBackend, open_index
from geosurge.archive.locating import Progress
from geosurge.archive.pool import TaskPool
from geosurge.archive.run import Job, Plan, run
from geosurge.archive.sources import scan
from geosurge.archive.tasks import Decode
from geosurge.bundle import open_bundle
from geosurge.commands.demo_steps import default_views
from geosurge.encoder import EncoderConfig, FusionConfig, ImageEncoder
from geosurge.images import OWN_LIMITS
from geosurge.locator import Locator
from geosurge.store import default_store, resolve_bundle

SIZES = {"large": ((4000, 3000), 600), "small": ((450, 340), 6000)}
"""Width and height, and pictures of a round."""

BATCH_SIZE = 32
BASES = 8
LOOP_PICTURES = 48
MEMORY_COUNTS = (1000, 10_000)
SAMPLE_SECONDS = 0.1


class Silent:
    def phase(self, name: str, total: int | None) -> Progress:
        return lambda *, failed=False: None

    def plan(self, plan: Plan) -> None:
        pass


def write_pictures(folder: Path, size: tuple[int, int], count: int) -> None:
    """A few pictures many times, each with other bytes after its end."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    bases = []
    for view in itertools.islice(sorted(default_views().glob("*.jpg")), BASES):
        pixels = np.asarray(Image.open(view).convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(pixels + rng.integers(-12, 13, pixels.shape, dtype=np.int16), 0, 255).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(noisy).save(content, "JPEG", quality=88)
        bases.append(content.getvalue())
    for number in range(count):
        (folder / f"{number:05}.jpg").write_bytes(bases[number % len(bases)] + number.to_bytes(4, "big"))


def seconds_of(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def run_once(folder: Path, backend: Backend) -> None:
    @contextlib.contextmanager
    def opened() -> Iterator[Backend]:
        yield backend

    with tempfile.TemporaryDirectory() as out:
        result = run(Job((str(folder),), Path(out)), opened, Silent())
        assert result is not None
        assert set(result.failures) == set(), result.failures


def decode_all(folder: Path, backend: LocalBackend) -> None:
    pictures = enumerate(scan([folder]))
    tasks = (Decode(number, found, backend.preprocessing, backend.limits) for number, found in pictures)
    with TaskPool(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.run(tasks):
            pass


@contextlib.contextmanager
def opened_backend(index: Path, device: str, encoder: str) -> Iterator[LocalBackend]:
    if encoder == "index":
        with open_index(index, device, BATCH_SIZE) as backend:
            yield backend
        return
    bundle = open_bundle(index)
    config = replace(EncoderConfig.full_size(), fusion=FusionConfig(dimension=bundle.manifest.dimension))
    full = ImageEncoder(config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with Locator.assemble(bundle, full, device, limits=OWN_LIMITS) as locator:
        yield LocalBackend(locator, full.useful_batch_size(BATCH_SIZE))


def measure(folder: Path, backend: LocalBackend, count: int, rounds: int) -> dict[str, float]:
    files = sorted(folder.iterdir())
    pixels = np.stack([backend.locator.preprocess(path.read_bytes()) for path in files[: backend.batch_size]])
    backend.locator.encode(pixels)
    rates: dict[str, list[float]] = {name: [] for name in ("run", "encoder", "decoder", "loop")}
    for _ in range(rounds):
        encoder_batches = max(1, min(8, count // len(pixels)), count // len(pixels) // 4)
        seconds = seconds_of(lambda: [backend.locator.encode(pixels) for _ in range(encoder_batches)])  # noqa: B023
        rates["encoder"].append(encoder_batches * len(pixels) / seconds)
        rates["decoder"].append(count / seconds_of(lambda: decode_all(folder, backend)))
        rates["run"].append(count / seconds_of(lambda: run_once(folder, backend)))
        few = files[:LOOP_PICTURES]
        rates["loop"].append(len(few) / seconds_of(lambda: [backend.locator.locate([path]) for path in few]))  # noqa: B023
    each = list(zip(rates["run"], rates["encoder"], rates["decoder"], rates["loop"], strict=True))
    return {
        "ratio_to_limit": statistics.median(done / min(encoder, decoder) for done, encoder, decoder, _ in each),
        "ratio_to_shared_limit": statistics.median(
            done * (1 / encoder + 1 / decoder) for done, encoder, decoder, _ in each
        ),
        "speedup_over_loop": statistics.median(done / loop for done, _, _, loop in each),
        **{f"{name}_per_s": statistics.median(values) for name, values in rates.items()},
    }


def peak_memory_bytes(folder: Path, index: Path) -> int:
    """Peak of the memory of a run's processes, shared pages counted once."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            "-m",
            "geosurge.commands.cli",
            "geotag",
            str(folder),
            "--out",
            out,
            "--index",
            str(index),
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            peak, parent = 0, psutil.Process(process.pid)
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    family = [parent, *parent.children(recursive=True)]
                    peak = max(peak, sum(member.memory_full_info().pss for member in family))
                time.sleep(SAMPLE_SECONDS)
        assert process.returncode == 0
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--index", type=Path, default=default_store(), help="bundle or store")
    parser.add_argument("--encoder", choices=["index", "full"], default="index", help="see above")
    parser.add_argument("--device", default="cpu", help="where encoder and index live: cpu, cuda or cuda:N")
    parser.add_argument("--pictures", type=int, help="pictures of a round; by default 600 large and 6,000 small ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, which takes minutes")
    arguments = parser.parse_args()
    index = resolve_bundle(arguments.index)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        with opened_backend(index, arguments.device, arguments.encoder) as backend:
            for name, (size, usual_count) in SIZES.items():
                count = arguments.pictures or usual_count
                folder = Path(temporary, name)
                write_pictures(folder, size, count)
                for key, value in measure(folder, backend, count, arguments.rounds).items():
                    figures[f"{name}.{key}"] = value
        if not arguments.no_memory:
            peaks = []
            for count in MEMORY_COUNTS:
                folder = Path(temporary, f"memory-{count}")
                write_pictures(folder, SIZES["small"][0], count)
                peaks.append(peak_memory_bytes(folder, index))
            figures |= {
                "peak_memory_mb": [round(peak / 1e6) for peak in peaks],
                "peak_memory_ratio": peaks[1] / peaks[0],
            }
    figures |= {"cores": len(os.sched_getaffinity(0)), "device": arguments.device, "encoder": arguments.encoder}
    if arguments.json:
        print(json.dumps(figures))
        return
    for key, value in figures.items():
        print(f"{key:32} {value if not isinstance(value, float) else f'{value:,.3g}'}")


if __name__ == "__main__":
    main()
