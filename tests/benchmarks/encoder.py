"""Time the encoder part by part against the arithmetic limit of the device, with random weights.

    python tests/benchmarks/encoder.py [--json] [--device cpu|cuda] [--size tiny|full] [--precision bfloat16|float32]
        [--batch N ...] [--variant NAME ...] [--repeats N]

**Sizes.** ``full`` is the paper's encoder: CLIP ViT-L/14 at 336 pixels and OneFormer Swin-L at 640. ``tiny`` has the
same kinds of models with a thousandth of the weights, to try the benchmark itself.

**Parts.** ``vision``, ``segmentation`` and ``fusion`` are timed on their own, each with the inputs that it has in the
encoder, and ``whole`` is the encoder from pixels to embeddings. ``share`` is a part's time over the sum of the three.

**Limit.** The rate of one large square matrix product, measured on the same device, in the same precision and in the
same rounds as everything else, over the operations that a part needs an image (`geosurge_training.planning.footprint`:
matrix products, convolutions, attention). ``of limit`` is the share of that rate that a part reaches. It can be
compared between machines; milliseconds cannot.

**Variants**, all with fused attention (PyTorch's scaled_dot_product_attention) where the model has it:

- ``engine``: as the engine loads an encoder, with weights in channels-last layout;
- ``contiguous``: weights in PyTorch's default layout;
- ``compile``: the engine's, each part through torch.compile;
- ``cuda_graph``: the engine's, each part recorded as a CUDA graph and replayed. A model that looks at values on its way
  cannot be recorded; OneFormer does.

A part that a variant cannot run is reported with the reason, and the others go on.

**Precision.** With bfloat16, weights are stored and multiplied in bf16 under PyTorch's autocast, which keeps norms and
softmax in float32.

**Timing.** Medians over rounds; in every round each variant and part has one turn, after one that is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from geosurge.encoder import EncoderConfig, FusionConfig, ImageEncoder, SegmentationConfig, VisionConfig
from geosurge.encoder.segmentation import ONEFORMER_TASK_TOKENS
from geosurge_training.planning.footprint import footprint, hollow, weightless

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.backbones import CLASS_COUNT, CLIP, ONEFORMER

PARTS = ("vision", "segmentation", "fusion")
VARIANTS = ("engine", "contiguous", "compile", "cuda_graph")
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
"""Side of the matrices whose product gives the limit; large enough to keep the whole device busy."""
FUSION_LIMIT = 0.05
"""Most of the encoder's time that the fusion module may take."""

Run = Callable[[], Tensor]


def encoder_config(size: str) -> EncoderConfig:
    if size == "full":
        return EncoderConfig.full_size()
    return EncoderConfig(
        VisionConfig(CLIP, 32),
        SegmentationConfig(ONEFORMER, 64, CLASS_COUNT, task_tokens=ONEFORMER_TASK_TOKENS),
        FusionConfig(dimension=24, width=16, latent_width=8, heads=2, blocks=2),
    )


def part_runs(encoder: ImageEncoder, pixels: Tensor) -> dict[str, Run]:
    """What each part computes, on inputs that lie on the device already."""
    seen = encoder.vision(pixels)
    fractions = encoder.segmenter(pixels, seen.grid)
    return {
        "vision": lambda: encoder.vision(pixels).tokens,
        "segmentation": lambda: encoder.segmenter(pixels, seen.grid),
        "fusion": lambda: encoder.fusion(seen.tokens, fractions),
        "whole": lambda: encoder(pixels),
    }


def operations(config: EncoderConfig) -> dict[str, int]:
    """Floating-point operations of each part for one image."""
    with weightless(), torch.no_grad():
        encoder = hollow(lambda: ImageEncoder(config))
        side = encoder.image_size
        runs = part_runs(encoder, torch.empty(1, 3, side, side, dtype=torch.uint8))
        counts = {part: footprint(runs[part]).flops for part in PARTS}
    return counts | {"whole": sum(counts.values())}


class Device:
    """Where everything runs, and how time is taken there."""

    def __init__(self, name: str, precision: str) -> None:
        self.torch = torch.device(name)
        self.dtype: torch.dtype = getattr(torch, precision)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch) if self.torch.type == "cuda" else "cpu"

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Reduced precision, and no gradients."""
        context = contextlib.ExitStack()
        context.enter_context(torch.inference_mode())
        # Weights are in bf16 already; autocast's own copies of them would have to outlive a recorded graph.
        context.enter_context(
            torch.autocast(self.torch.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16, cache_enabled=False)
        )
        return context

    def seconds(self, run: Run) -> float:
        self.wait()
        begin = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        if self.torch.type == "cuda":
            torch.cuda.synchronize(self.torch)

    def encoder(self, config: EncoderConfig, *, channels_last: bool) -> ImageEncoder:
        torch.manual_seed(0)
        with self.torch:
            encoder = ImageEncoder(config).to(self.dtype)
        return encoder.to(memory_format=torch.channels_last) if channels_last else encoder  # type: ignore[call-overload]

    def product(self) -> tuple[Run, int]:
        """A large matrix product, and its operations."""
        side = PRODUCT_SIZE[self.torch.type]
        left, right = (torch.randn(side, side, dtype=self.dtype, device=self.torch) for _ in range(2))
        return lambda: left @ right, 2 * side**3


def recorded(run: Run) -> Run:
    """The same computation on the same inputs, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # What is chosen and allocated at the first calls must not happen while recording.
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def variant_runs(variant: str, encoder: ImageEncoder, pixels: Tensor) -> tuple[dict[str, Run], dict[str, str]]:
    """The parts of a variant that it can run, and for the others the reason."""
    runs, refusals = part_runs(encoder, pixels), {}
    for part, run in list(runs.items()):
        try:
            if variant == "compile":
                runs[part] = torch.compile(run)
            elif variant == "cuda_graph":
                runs[part] = recorded(run)
            runs[part]()
        except RuntimeError as error:
            refusals[part] = str(error).strip().splitlines()[0]
            del runs[part]
    return runs, refusals


def measure(device: Device, config: EncoderConfig, batches: list[int], variants: list[str], rounds: int) -> Any:
    counts = operations(config)
    product, product_operations = device.product()
    layouts = {variant: variant != "contiguous" for variant in variants}
    encoders = {layout: device.encoder(config, channels_last=layout) for layout in set(layouts.values())}
    any_encoder = next(iter(encoders.values()))
    rows, rates = [], []
    with device.context():
        for batch in batches:
            side = any_encoder.image_size
            pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device.torch)
            turns: dict[tuple[str, str], Run] = {}
            refusals: dict[tuple[str, str], str] = {}
            for variant in variants:
                runs, refused = variant_runs(variant, encoders[layouts[variant]], pixels)
                turns |= {(variant, part): run for part, run in runs.items()}
                refusals |= {(variant, part): reason for part, reason in refused.items()}
            product()
            times: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
            seconds = []
            for _ in range(rounds):
                seconds.append(device.seconds(product))
                for turn, run in turns.items():
                    times[turn].append(device.seconds(run))
            rate = product_operations / statistics.median(seconds)
            rates.append(rate)
            medians = {turn: statistics.median(values) / batch for turn, values in times.items()}
            rows += rows_of(batch, variants, medians, refusals, counts, rate)
    return {
        "rows": rows,
        "matrix_product_tflops": statistics.median(rates) / 1e12,
        "gflops_an_image": {part: count / 1e9 for part, count in counts.items()},
        "limit_images_a_second": statistics.median(rates) / counts["whole"],
        "parameters": any_encoder.parameter_counts(),
        "device": device.name,
        "precision": str(device.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def rows_of(
    batch: int,
    variants: list[str],
    seconds: dict[tuple[str, str], float],
    refusals: dict[tuple[str, str], str],
    counts: dict[str, int],
    rate: float,
) -> list[dict[str, Any]]:
    rows = []
    for variant in variants:
        known = [seconds.get((variant, part)) for part in PARTS]
        total = None if None in known else sum(value for value in known if value is not None)
        for part in (*PARTS, "whole"):
            row: dict[str, Any] = {"batch": batch, "variant": variant, "part": part}
            time_s = seconds.get((variant, part))
            if time_s is None:
                rows.append(row | {"refused": refusals[variant, part]})
                continue
            share = time_s / total if total is not None and part != "whole" else None
            rows.append(
                row
                | {
                    "ms_an_image": 1000 * time_s,
                    "images_a_second": 1 / time_s,
                    "share": share,
                    "of_limit": counts[part] / time_s / rate,
                }
            )
    return rows


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    console = Console(highlight=False)
    table = Table(
        title=f"the encoder on {report['device']} in {report['precision']}",
        box=box.SIMPLE,
        padding=(0, 1),
        title_justify="left",
    )
    for heading in ("batch", "variant", "part", "ms/image", "images/s", "share", "of limit"):
        table.add_column(heading, justify="left" if heading in ("variant", "part") else "right", no_wrap=True)
    for row in report["rows"]:
        names = (str(row["batch"]), row["variant"], row["part"])
        if "refused" in row:
            table.add_row(*names, "-", "-", "-", "-")
            continue
        share = "" if row["share"] is None else f"{row['share']:.1%}"
        table.add_row(
            *names, f"{row['ms_an_image']:.2f}", f"{row['images_a_second']:.2f}", share, f"{row['of_limit']:.1%}"
        )
    console.print(table)
    for row in report["rows"]:
        if "refused" in row:
            console.print(f"batch {row['batch']}, {row['variant']} cannot run {row['part']}: {row['refused']}")
    fusion = [row["share"] for row in report["rows"] if row["part"] == "fusion" and row.get("share") is not None]
    if fusion:
        verdict = "within" if max(fusion) < FUSION_LIMIT else "OVER"
        console.print(f"The fusion module takes {max(fusion):.1%} at most: {verdict} the {FUSION_LIMIT:.0%} allowed.")
    gflops = ", ".join(f"{part} {value:,.3f}" for part, value in report["gflops_an_image"].items())
    console.print(
        f"GFLOP an image: {gflops}. A matrix product reaches {report['matrix_product_tflops']:.3f} TFLOP/s here, "
        f"which allows {report['limit_images_a_second']:.2f} images a second.\n"
        f"Rounds: {report['rounds']}. Threads: {report['threads']}. Versions: {report['versions']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--size", choices=["tiny", "full"], default="full")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 on a CPU; 1, 8 and 32 on a GPU")
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", help="default: engine on a CPU, all on a GPU")
    parser.add_argument("--repeats", type=int, help="rounds; default: 2 on a CPU, 10 on a GPU")
    arguments = parser.parse_args()
    device = Device(arguments.device, arguments.precision)
    gpu = device.torch.type == "cuda"
    report = measure(
        device,
        encoder_config(arguments.size),
        arguments.batch or ([1, 8, 32] if gpu else [1]),
        arguments.variant or (list(VARIANTS) if gpu else ["engine"]),
        arguments.repeats or (10 if gpu else 2),
    )
    if arguments.json:
        json.dump(report | {"size": arguments.size}, sys.stdout)
        print()
    else:
        show(report)


if __name__ == "__main__":
    main()
