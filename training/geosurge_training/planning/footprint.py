"""What a computation costs, found out without doing it: arithmetic operations, and memory at its peak.

The computation runs on tensors that have a shape, a type and a device but no memory (PyTorch's fake tensors). Every
operation is seen: matrix products, convolutions and attention are counted, and so is every allocation, from its
operation to the moment when nothing refers to it any more. A model of any size is measured in seconds on any machine.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten
_Module = TypeVar("_Module", bound=nn.Module)
_Operation: TypeAlias = Callable[..., object]
_Shape: TypeAlias = Sequence[int]


@dataclass(frozen=True)
class Footprint:
    """What a computation costs.

    Attributes:
        flops: Floating-point operations of its matrix products, convolutions and attention; a multiplication and an
            addition are two. Element-wise operations are not counted: they cost memory traffic, not arithmetic.
        peak_bytes: The most memory that its own tensors hold at one time, results included and inputs not.
    """

    flops: int
    peak_bytes: int


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Inside, every tensor that is made has no memory behind it.

    No operation can ask for a value. Two questions that models ask nevertheless are answered as trained models would
    have it: a check holds, and no place is non-zero (no attention mask is full). Neither changes what is computed.
    """
    with FakeTensorMode(), _ValueFree():  # type: ignore[no-untyped-call]
        yield


def hollow(build: Callable[[], _Module]) -> _Module:
    """Builds a module without memory for its weights; inside `weightless`, where it can then be run.

    Args:
        build: Builds the module; whatever it runs while it is built must work on PyTorch's meta device.

    Returns:
        The module, on the CPU as far as it knows.
    """
    # Weights are drawn at random while a model is built, which fake tensors cannot do across its deep copies.
    with _disable_current_modes(), torch.device("meta"):
        module = build()
    # A module's own conversions move values, and there are none.
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))  # type: ignore[no-untyped-call]
    return module


def footprint(run: Callable[[], object]) -> Footprint:
    """Runs a computation and counts what it costs; inside `weightless`, without doing the arithmetic.

    Args:
        run: The computation.

    Returns:
        Its cost.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with counter, _LiveBytes() as memory:
        run()
    return Footprint(counter.get_total_flops(), memory.peak)


class _ValueFree(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers the questions for values; see `weightless`."""

    def __torch_dispatch__(
        self, func: _Operation, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        if func is _aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True
        if func is _aten.nonzero.default:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up the storages that operations make, for as long as they are referred to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._seen: weakref.WeakSet[UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: _Operation, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        # A result can lie in an argument's storage: that of a view, or of an operation in place.
        self._seen.update(_storages((args, kwargs)))
        results = func(*args, **(kwargs or {}))
        for storage in _storages(results):
            if storage not in self._seen:
                self._seen.add(storage)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return results

    def _release(self, size: int) -> None:
        self._live -= size


def _storages(values: object) -> Iterator[UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_iter(values) if isinstance(leaf, Tensor))


def _attention(query: _Shape, key: _Shape, value: _Shape, *_: object, **__: object) -> int:
    """Scores, and the mean of the values that they weigh."""
    return 2 * prod(query[:-1]) * key[-2] * (key[-1] + value[-1])


def _attention_backward(_: _Shape, query: _Shape, key: _Shape, value: _Shape, *__: object, **___: object) -> int:
    """The scores once more, since they were not kept, and two products for each of the two of the forward pass."""
    return 2 * prod(query[:-1]) * key[-2] * (3 * key[-1] + 2 * value[-1])


# PyTorch's counter knows fused attention on GPUs, but not on CPUs.
_CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
