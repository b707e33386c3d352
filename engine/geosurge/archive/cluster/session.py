"""The connection to a Ray, and what it says when it fails."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from geosurge.cores import usable_cores
from geosurge.errors import GeoSurgeError, ServiceError, UsageError

OWN_CLUSTER: Final = "local"
"""The address that starts a Ray on this machine, even if there is one."""

SPARE_SLOTS: Final = 2
"""CPUs that no step of a run may take; see `geosurge.archive.cluster.locating`."""

_CONNECT_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Cluster:
    """Where and with what a run locates on Ray.

    Attributes:
        address: Of the cluster, as of ``ray.init``. Empty joins the one that there is, or else starts one on this
            machine, and `OWN_CLUSTER` always starts one.
        index: The index bundle.
        device: ``"cpu"``, for one actor on every machine, or ``"cuda"``, for one on every GPU.
        batch_size: Pictures encoded together.
    """

    address: str
    index: Path
    device: str
    batch_size: int

    def __post_init__(self) -> None:
        """Checks what can be checked here.

        Raises:
            UsageError: Ray is not installed, or the device is one GPU of many.
        """
        if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pandas") is None:
            raise UsageError("--ray needs Ray Data, which is not installed: pip install 'geosurge[bulk]'")
        if self.device not in {"cpu", "cuda"}:
            raise UsageError(f"--ray gives every GPU an actor: the device is cpu or cuda, not {self.device}")


@contextlib.contextmanager
def session(address: str) -> Iterator[int]:
    """A connection to Ray, and the number of CPUs that it has; where this process has one already, it is used."""
    # Nothing about a run is anybody else's business.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # noqa: PLC0415 - an extra

    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            try:
                _connect(address)
            except (OSError, RuntimeError, ValueError) as error:
                where = address or "this machine"
                raise ServiceError(
                    f"cannot reach a Ray cluster at {where}: {error}; is it running, and are its Ray, Python and "
                    "RAY_AUTH_MODE the same as here?"
                ) from error
        slots = math.floor(ray.cluster_resources().get("CPU", 0))
        if slots <= SPARE_SLOTS:
            raise UsageError(
                f"the Ray cluster has {slots} CPUs, and a run needs {SPARE_SLOTS + 1}; add machines, or have it count "
                "more: ray start --num-cpus N"
            )
        yield slots


def _connect(address: str) -> None:
    import ray  # noqa: PLC0415

    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    host, colon, port = address.rpartition(":")
    if colon:
        # Where nobody listens, Ray would try for a quarter of an hour.
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    if address != OWN_CLUSTER:
        try:
            ray.init(address or "auto", **quietly)
        except ConnectionError:
            if address:
                raise
        else:
            return
    slots = usable_cores() + SPARE_SLOTS
    ray.init(OWN_CLUSTER, num_cpus=slots, include_dashboard=False, **quietly)


def actor_count(device: str) -> int:
    """How many actors locate: one on every GPU, or on every machine."""
    import ray  # noqa: PLC0415

    if device == "cpu":
        return sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes())
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus == 0:
        raise UsageError("the Ray cluster has no GPU; leave out --device cuda, or give it one")
    return gpus


@contextlib.contextmanager
def naming_errors() -> Iterator[None]:
    """Has Ray's errors say what they are about."""
    from ray.exceptions import RayError  # noqa: PLC0415

    try:
        yield
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, GeoSurgeError):
            raise cause from error
        what = repr(cause) if cause is not None else str(error).strip().rpartition("\n")[2]
        raise ServiceError(f"Ray could not go on: {what}; its logs say more; give the same command again") from error
