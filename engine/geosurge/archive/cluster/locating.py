"""The pipeline of a run on Ray: from the parts of pictures to the parts of answers, and on from where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from geosurge.archive.backends import open_index
from geosurge.archive.cluster.parts import ANSWERS, ID, PICTURES, count_failures, export_pictures, note_answers
from geosurge.archive.cluster.session import SPARE_SLOTS, Cluster, actor_count, naming_errors, session
from geosurge.archive.cluster.steps import DecodeStep, LocateStep
from geosurge.archive.ledger import Ledger
from geosurge.archive.locating import Progress, Thresholds, answer_key
from geosurge.errors import InputError, ServiceError, UsageError
from geosurge.location import LocateOptions

CLUSTER_DIRECTORY: Final = ".geosurge-ray"

_CHECKPOINT: Final = "checkpoint"
_NAME_LENGTH: Final = 16

_SMALL_SLOT: Final = 0.05
_FILTER_BYTES: Final = 64 << 20
_COUNT_SECONDS: Final = 1.0


def locate_on_cluster(
    ledger: Ledger,
    cluster: Cluster,
    directory: Path,
    progress: Progress,
    *,
    options: LocateOptions,
    thresholds: Thresholds,
) -> None:
    """Locates every picture that is still to be located, on Ray.

    Args:
        ledger: What is to be located, and where the answers go.
        cluster: Where it is done.
        directory: The run's.
        progress: Called, from another thread, for every picture that has an answer.
        options: How pictures are located.
        thresholds: Which guesses are held back.

    Raises:
        UsageError: The index cannot answer with these options, or the cluster has not what is asked for.
        ServiceError: It cannot be reached, or cannot go on; the next run does the rest.
        GeoSurgeError: The index cannot be opened.
    """
    # Here the index is opened for what it says about itself, and so that what is wrong with it is told at once.
    with open_index(cluster.index, "cpu", cluster.batch_size) as backend:
        # What is wrong with the request would come back as every picture's error.
        try:
            backend.locator.validate_options(options)
        except InputError as error:
            raise UsageError(str(error)) from error
        key = answer_key(backend, options)
        decode = DecodeStep(backend.preprocessing, backend.limits)
    name = hashlib.sha256(repr(astuple(key)).encode()).hexdigest()[:_NAME_LENGTH]
    exchange = directory.resolve() / CLUSTER_DIRECTORY / name
    with session(cluster.address) as slots:
        export_pictures(ledger, exchange, cluster.batch_size, slots)
        with (
            _settings(exchange / _CHECKPOINT),
            _counting(exchange, progress),
            naming_errors(),
        ):
            _locate_parts(exchange, cluster, options, decode, slots)
    note_answers(ledger, key, thresholds, exchange)
    shutil.rmtree(exchange)
    if missing := ledger.counts().get(None, 0):
        raise ServiceError(f"{missing} pictures came back from Ray without an answer; give the same command again")


def clear_exchanges(directory: Path) -> None:
    """Removes what runs on Ray have left there, once nothing is to be located that they could go on with.

    Args:
        directory: The run's.
    """
    home = directory / CLUSTER_DIRECTORY
    for exchange in home.glob("[0-9a-f]" * _NAME_LENGTH):
        shutil.rmtree(exchange, ignore_errors=True)
    # Somebody else may have put something there.
    with contextlib.suppress(OSError):
        home.rmdir()


def _locate_parts(exchange: Path, cluster: Cluster, options: LocateOptions, decode: DecodeStep, slots: int) -> None:
    """Runs the pipeline: pictures in, rows with answers out.

    When a run goes on, Ray Data holds one slot for its filter and, for a moment, another one to list the parts. Where
    decoding and locating took all the others, everything would wait for everything.
    """
    import ray  # noqa: PLC0415
    from ray.data import ActorPoolStrategy, TaskPoolStrategy  # noqa: PLC0415

    files, parts = LocalFileSystem(), len(list((exchange / PICTURES).iterdir()))
    on_gpu = cluster.device != "cpu"
    # With partitioning, somebody's own folder "a=b" on the way to the files would become a column.
    pictures = ray.data.read_parquet(
        str(exchange / PICTURES),
        filesystem=files,
        partitioning=None,
        override_num_blocks=parts,
        num_cpus=_SMALL_SLOT,
    )
    decoded = pictures.map_batches(
        decode,
        batch_size=cluster.batch_size,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=min(slots - SPARE_SLOTS, parts)),
        num_cpus=1,
    )
    answers = decoded.map_batches(
        LocateStep,
        fn_constructor_args=(cluster, options),
        batch_size=cluster.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actor_count(cluster.device)),
        num_cpus=0 if on_gpu else _SMALL_SLOT,
        num_gpus=1 if on_gpu else None,
    )
    answers.write_parquet(str(exchange / ANSWERS), filesystem=files, ray_remote_args={"num_cpus": _SMALL_SLOT})


@contextlib.contextmanager
def _settings(checkpoint: Path) -> Iterator[None]:
    """Ray Data's settings: rows that were written are not computed again, and nothing is printed."""
    from ray.data import DataContext  # noqa: PLC0415
    from ray.data.checkpoint import CheckpointConfig  # noqa: PLC0415

    config = CheckpointConfig(
        ID, str(checkpoint), delete_checkpoint_on_success=False, override_filesystem=LocalFileSystem()
    )
    # The filter looks numbers up; by default up to ten actors with a slot and a gigabyte each do.
    config.checkpoint_actor_pool_max_size = 1
    config.checkpoint_actor_memory_bytes = _FILTER_BYTES
    context = DataContext.get_current()
    settings = {
        "checkpoint_config": config,
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
        "use_datasource_v2": False,  # It joins parts to blocks of 128 MB: one task for a million pictures.
    }
    before = {name: getattr(context, name) for name in settings}
    # Errors are raised as well; the log of Ray's session keeps everything. Ray lends
    # the caller's own handlers to that logger too, which stay as they are.
    consoles = [
        (handler, handler.level)
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray.")
    ]
    for handler, _ in consoles:
        handler.setLevel(logging.CRITICAL)
    for name, value in settings.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for handler, level in consoles:
            handler.setLevel(level)


@contextlib.contextmanager
def _counting(exchange: Path, progress: Progress) -> Iterator[None]:
    """Meanwhile, tells how many rows are complete: those of files that are not pending any more."""
    stopped, seen = threading.Event(), set[Path]()

    def count() -> None:
        for path in set((exchange / _CHECKPOINT).glob("*.parquet")) - seen:
            if not path.name.endswith(".pending.parquet"):
                with contextlib.suppress(OSError, pa.ArrowException):
                    failures = count_failures(exchange, path.stem)
                    for number in range(pq.read_metadata(path).num_rows):
                        progress(failed=number < failures)
                    seen.add(path)

    def watch() -> None:
        while not stopped.wait(_COUNT_SECONDS):
            count()
        count()

    thread = threading.Thread(target=watch, name="geosurge-count")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
