"""FAISS itself: which build is installed, on which threads it runs, and the arrays that it fills."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from geosurge.devices import device_to_gpu
from geosurge.errors import UsageError

try:
    import faiss
except ImportError as error:
    raise ImportError(
        "FAISS is not installed: install exactly one of geosurge[cpu] and geosurge[gpu] (both own the module `faiss`)"
    ) from error

__all__ = [
    "GPU_SELECTION_LIMIT",
    "FaissIndex",
    "FoundRows",
    "Pointer",
    "faiss",
    "faiss_gpu",
    "one_openmp_thread",
    "probing",
]

FaissIndex: TypeAlias = Any
"""A FAISS index; FAISS's type stubs lack the methods and members that are used here."""

Pointer: TypeAlias = Any
"""The address of an array, as FAISS's C interface takes it."""

GPU_SELECTION_LIMIT = 2048
"""The largest k and nprobe of FAISS's GPU kernels."""


class FoundRows:
    """The ``k`` best rows of an index for each of ``n`` queries, as arrays that FAISS fills, and where they lie."""

    __slots__ = ("k", "ordinals", "ordinals_pointer", "scores", "scores_pointer")

    def __init__(self, n: int, k: int) -> None:
        self.k = k
        self.ordinals = np.empty((n, k), np.int64)
        self.scores = np.empty((n, k), np.float32)
        self.ordinals_pointer = faiss.swig_ptr(self.ordinals)
        self.scores_pointer = faiss.swig_ptr(self.scores)


@contextlib.contextmanager
def one_openmp_thread() -> Iterator[None]:
    """Keep FAISS on the calling thread, whose own setting this is."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


@functools.lru_cache(maxsize=64)
def probing(list_count: int) -> faiss.SearchParametersIVF:
    """Parameters of a search in so many lists, shared because FAISS only reads them and making them takes long."""
    parameters = faiss.SearchParametersIVF()
    parameters.nprobe = list_count
    return parameters


def faiss_gpu(device: str) -> int | None:
    """The number of the GPU, which FAISS can use, or ``None`` for the CPU.

    Raises:
        UsageError: The device is unknown, or FAISS cannot use it.
    """
    gpu = device_to_gpu(device)
    if gpu is None:
        return None
    if not hasattr(faiss, "StandardGpuResources"):
        raise UsageError(
            f"the device {device!r} needs FAISS's GPU build, and the CPU build is installed; "
            "replace faiss-cpu by geosurge[gpu], or use cpu"
        )
    count = faiss.get_num_gpus()
    if gpu >= count:
        raise UsageError(f"the device {device!r} does not exist: FAISS sees {count} GPUs; use cpu or another GPU")
    return gpu
