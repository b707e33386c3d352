"""An encoder recorded as a TorchScript graph, so that it runs without the interpreter.

A small encoder makes hundreds of calls from Python for one image, and each gives the interpreter's lock away and waits
for it again: beside an event loop and decoding threads that costs as much as the arithmetic. As a graph, the whole
encoder is one call. `torch.export` does not help (its graphs run in Python unless a C++ compiler is at hand).

The graph takes the weights as arguments. It is thus recorded once for all encoders of one configuration, holds no
weights of its own, and follows weights that change. Python's branches are lost in a recording, so every graph has to
agree with the encoder on other images, batch sizes and weights before it is used.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from geosurge.encoder.model import ImageEncoder

logger = logging.getLogger(__name__)

MAX_PARAMETERS: Final = 20_000_000
"""A larger encoder spends its time in the operations, not between them."""

_CHECKED_BATCH_SIZES: Final = (1, 2, 5)
_MAX_DIFFERENCE: Final = 1e-5

_MIN_PART_SIZE: Final = 2
"""Images that are worth a thread of their own."""

_Graph = Callable[..., Tensor]
"""Of pixels and then of every weight."""

_Place = tuple[dict[str, Any], str]
"""Where a weight is kept: a dictionary of a module, and its name there."""

# Two, because encoding must not wait for a recording.
_graphs_lock, _threads_lock = threading.Lock(), threading.Lock()
_graphs: dict[tuple[type, str], _Graph] = {}


def as_graph(encoder: ImageEncoder) -> Callable[[Tensor], Tensor] | None:
    """What encodes as the encoder does, but runs as a graph; it is recorded once in a process for each configuration.

    Args:
        encoder: On the CPU, in evaluation mode; other threads must not use it meanwhile.

    Returns:
        A function that gives what the encoder's `forward` does, with the weights that it then has; ``None`` where the
        encoder is large, cannot be recorded, or does not agree with its recording.
    """
    places = list(_places(encoder))
    if sum(place[name].numel() for place, name in places) > MAX_PARAMETERS:
        return None
    key = type(encoder), encoder.config.to_json()
    with _graphs_lock:
        graph = _graphs.get(key) or _record(encoder, places)
        if graph is not None:
            _graphs[key] = graph
    return None if graph is None else lambda pixels: _run(graph, pixels, [place[name] for place, name in places])


def _run(graph: _Graph, pixels: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Runs a graph, on one thread for each part of a batch.

    Threads that share every operation wait for each other hundreds of times in a batch, each time for one that the
    machine may have given to somebody else. For a few images there is no other way.
    """
    threads = torch.get_num_threads()
    if threads < 2 or len(pixels) < _MIN_PART_SIZE * threads:
        return graph(pixels, *weights)
    with _threads_lock:
        pool = _part_threads(threads, os.getpid())
    run = functools.partial(_run_part, graph, weights)
    return torch.cat(list(pool.map(run, pixels.tensor_split(threads))))


@torch.inference_mode()
def _run_part(graph: _Graph, weights: Sequence[Tensor], pixels: Tensor) -> Tensor:
    return graph(pixels, *weights)


@functools.cache
def _part_threads(count: int, _process: int) -> ThreadPoolExecutor:
    """Threads whose operations are computed by the thread itself; a forked process needs its own."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        # The first look at the number of threads sets it to what any thread has set last.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, "geosurge-encode-part", initializer=start)
    try:
        for _ in range(count):
            pool.submit(int)
        started.wait()
    except BaseException:
        started.abort()
        raise
    finally:
        torch.set_num_threads(count)
    return pool


def _places(encoder: ImageEncoder) -> Iterator[_Place]:
    """Every parameter and buffer; one that two modules share comes twice, at both of its places."""
    for module in encoder.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield tensors, name


def _record(encoder: ImageEncoder, places: Sequence[_Place]) -> _Graph | None:
    weights = [place[name] for place, name in places]

    def forward(pixels: Tensor, *weights: Tensor) -> Tensor:
        own = [place[name] for place, name in places]
        try:
            for (place, name), weight in zip(places, weights, strict=True):
                place[name] = weight
            return encoder.forward(pixels)
        finally:
            for (place, name), weight in zip(places, own, strict=True):
                place[name] = weight

    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph: _Graph = torch.jit.trace(  # type: ignore[no-untyped-call]
                forward, (_pixels(encoder, 2), *weights), check_trace=False
            )
            halved = [weight / 2 if weight.is_floating_point() else weight for weight in weights]
            for size, used in [*((size, weights) for size in _CHECKED_BATCH_SIZES), (2, halved)]:
                pixels = _pixels(encoder, size)
                # Twice, because the first call of a graph is a rehearsal for the ones that follow.
                for _ in range(2):
                    difference = float((graph(pixels, *used) - forward(pixels, *used)).abs().max())
                    if not difference <= _MAX_DIFFERENCE:
                        raise RuntimeError(f"a batch of {size} differs by {difference:.1e}")
    except Exception as error:  # noqa: BLE001 - whatever torch says: the encoder works without a graph
        logger.info("the encoder runs without a graph", extra={"cause": f"{type(error).__name__}: {error}"[:200]})
        return None
    # Torch attaches the recorded function, which holds this encoder.
    vars(graph).clear()
    return graph


def _pixels(encoder: ImageEncoder, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (count, 3, encoder.image_size, encoder.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
