"""Locating on Ray: the pictures that a ledger asks for, spread over the machines of a cluster, and their answers back.

The rest of a run is as ever: the ledger says what is to be located, and outputs are made from it. Between the two,
everything lies in files under the run's directory, which every machine must see under the same path, as it must see
the sources and the index:

| ``DIR/ray/KEY/`` | what |
|---|---|
| ``pictures/`` | what is to be located, in parts that are each one task |
| ``answers/`` | a row for each: its answer, or why there is none |
| ``checkpoint/`` | Ray Data's own: which rows of ``answers`` are complete |

KEY stands for index version, encoder and options. A run that was interrupted goes on from its checkpoint; the folder
is removed once the ledger has the answers. Pictures are read and decoded by tasks, each through a process of its own
that a picture may crash, and located by actors, one to a machine or GPU, that keep the index open.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import logging
import math
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from geosurge.archive.decoding import Decode, Decoded, DecodePool, Failure, Outcome, Unusable
from geosurge.archive.engines import Query, open_index
from geosurge.archive.ledger import AnswerKey, Ledger, Noted
from geosurge.archive.locating import Asked, Progress, answer_key, essential
from geosurge.archive.sources import Found
from geosurge.cores import usable_cores
from geosurge.errors import GeoSurgeError, OutputNotWritableError, ServiceError, UsageError
from geosurge.images import ImageLimits
from geosurge.location import LocateOptions
from geosurge.preprocessing import Preprocessing
from geosurge.v1 import geolocation_pb2
from geosurge.wire import location_to_response, response_to_location

CLUSTER_DIRECTORY: Final = "ray"

OWN_CLUSTER: Final = "local"
"""The address that starts a Ray on this machine, even if there is one."""

_PICTURES: Final = "pictures"
_ANSWERS: Final = "answers"
_CHECKPOINT: Final = "checkpoint"

_ID: Final = "id"
_MAX_BATCHES_A_PART: Final = 8
_PARTS_A_SLOT: Final = 4
_ROWS_AT_ONCE: Final = 1024
_SPARE_SLOTS: Final = 2
_SMALL_SLOT: Final = 0.05
_FILTER_BYTES: Final = 64 << 20
_COUNT_SECONDS: Final = 1.0
_CONNECT_SECONDS: Final = 10.0

_PICTURE_SCHEMA: Final = pa.schema(
    [
        (_ID, pa.int64()),
        ("key", pa.int64()),
        ("path", pa.binary()),
        ("member", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("offset", pa.int64()),
    ]
)
_FAILURE: Final = [("reason", pa.string()), ("detail", pa.string()), ("is_final", pa.bool_())]
_DECODED_SCHEMA: Final = pa.schema(
    [
        (_ID, pa.int64()),
        ("key", pa.int64()),
        ("content_hash", pa.binary()),
        ("pixels", pa.large_binary()),
        ("decode_ms", pa.float64()),
        *_FAILURE,
    ]
)
_ANSWER_SCHEMA: Final = pa.schema(
    [(_ID, pa.int64()), ("key", pa.int64()), ("content_hash", pa.binary()), ("response", pa.binary()), *_FAILURE]
)


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


def locate_on_cluster(ledger: Ledger, cluster: Cluster, directory: Path, asked: Asked, progress: Progress) -> None:
    """Locates every picture that is still to be located, on Ray.

    Args:
        ledger: What is to be located, and where the answers go.
        cluster: Where it is done.
        directory: The run's.
        asked: How pictures are located.
        progress: Called, from another thread, for every picture that has an answer.

    Raises:
        UsageError: The cluster has not what is asked for.
        ServiceError: It cannot be reached, or cannot go on; the next run does the rest.
        GeoSurgeError: The index cannot be opened.
    """
    # Here the index is opened for what it says about itself, and so that what is wrong with it is told at once.
    with open_index(cluster.index, "cpu", cluster.batch_size) as engine:
        key = answer_key(engine, asked.options)
        assert engine.preprocessing is not None
        decode = _Decode(engine.preprocessing, engine.limits)
    home = directory.resolve() / CLUSTER_DIRECTORY
    place = home / hashlib.sha256(repr(astuple(key)).encode()).hexdigest()[:16]
    with _session(cluster.address) as slots:
        _export(ledger, place / _PICTURES, cluster.batch_size, slots)
        with _settings(place / _CHECKPOINT), _counting(place / _CHECKPOINT, progress), _naming():
            _locate_parts(place, cluster, asked.options, decode, slots)
    _note_answers(ledger, key, asked, place)
    shutil.rmtree(home)
    if missing := ledger.counts().get(None, 0):
        raise ServiceError(f"{missing} pictures came back from Ray without an answer; give the same command again")


def _identity(noted: Noted) -> int:
    """Names a picture as it is now: another one once its file has changed."""
    found = noted.found
    fields = (noted.key, found.path, found.member, found.size, found.mtime_ns, found.offset)
    return int.from_bytes(hashlib.blake2b(repr(fields).encode(), digest_size=8).digest(), "big", signed=True)


@contextlib.contextmanager
def _session(address: str) -> Iterator[int]:
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
        if slots <= _SPARE_SLOTS:
            raise UsageError(
                f"the Ray cluster has {slots} CPUs, and a run needs {_SPARE_SLOTS + 1}; add machines, or have it count "
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
    slots = usable_cores() + _SPARE_SLOTS
    ray.init(OWN_CLUSTER, num_cpus=slots, include_dashboard=False, **quietly)


def _actor_count(device: str) -> int:
    """How many actors locate: one on every GPU, or on every machine."""
    import ray  # noqa: PLC0415

    if device == "cpu":
        return sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes())
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus == 0:
        raise UsageError("the Ray cluster has no GPU; leave out --device cuda, or give it one")
    return gpus


def _export(ledger: Ledger, directory: Path, batch_size: int, slots: int) -> None:
    """Writes what is to be located into parts, enough for every slot to have some and each of whole batches."""
    total = ledger.counts().get(None, 0)
    batches = total // (batch_size * slots * _PARTS_A_SLOT)
    rows_a_part = batch_size * min(max(batches, 1), _MAX_BATCHES_A_PART)
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        pictures = ledger.to_locate()
        for number in itertools.count():
            rows = [_picture(noted) for noted in itertools.islice(pictures, rows_a_part)]
            if not rows:
                return
            pq.write_table(pa.Table.from_pylist(rows, _PICTURE_SCHEMA), directory / f"{number:08}.parquet")
    except OSError as error:
        raise OutputNotWritableError(
            f"{directory} cannot be written: {error}; make room, or name another directory"
        ) from error


def _picture(noted: Noted) -> dict[str, object]:
    found = noted.found
    return {
        _ID: _identity(noted),
        "key": noted.key,
        "path": found.path,
        "member": found.member,
        "size": found.size,
        "mtime_ns": found.mtime_ns,
        "offset": found.offset,
    }


def _locate_parts(place: Path, cluster: Cluster, options: LocateOptions, decode: _Decode, slots: int) -> None:
    """Runs the pipeline: pictures in, rows with answers out.

    When a run goes on, Ray Data holds one slot for its filter and, for a moment, another one to list the parts. Where
    decoding and locating took all the others, everything would wait for everything.
    """
    import ray  # noqa: PLC0415
    from ray.data import ActorPoolStrategy, TaskPoolStrategy  # noqa: PLC0415

    files, parts = LocalFileSystem(), len(list((place / _PICTURES).iterdir()))
    on_gpu = cluster.device != "cpu"
    # With partitioning, somebody's own folder "a=b" on the way to the files would become a column.
    pictures = ray.data.read_parquet(
        str(place / _PICTURES), filesystem=files, partitioning=None, override_num_blocks=parts, num_cpus=_SMALL_SLOT
    )
    decoded = pictures.map_batches(
        decode,
        batch_size=cluster.batch_size,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=slots - _SPARE_SLOTS),
        num_cpus=1,
    )
    answers = decoded.map_batches(
        _Locate,
        fn_constructor_args=(cluster, options),
        batch_size=cluster.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=_actor_count(cluster.device)),
        num_cpus=0 if on_gpu else _SMALL_SLOT,
        num_gpus=1 if on_gpu else None,
    )
    answers.write_parquet(str(place / _ANSWERS), filesystem=files, ray_remote_args={"num_cpus": _SMALL_SLOT})


@contextlib.contextmanager
def _settings(checkpoint: Path) -> Iterator[None]:
    """Ray Data's settings: rows that were written are not computed again, and nothing is printed."""
    from ray.data import DataContext  # noqa: PLC0415
    from ray.data.checkpoint import CheckpointConfig  # noqa: PLC0415

    config = CheckpointConfig(
        _ID, str(checkpoint), delete_checkpoint_on_success=False, override_filesystem=LocalFileSystem()
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
def _naming() -> Iterator[None]:
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


@contextlib.contextmanager
def _counting(checkpoint: Path, progress: Progress) -> Iterator[None]:
    """Meanwhile, tells how many rows are complete: those of files that are not pending any more."""
    stopped, seen = threading.Event(), set[Path]()

    def count() -> None:
        for path in set(checkpoint.glob("*.parquet")) - seen:
            if not path.name.endswith(".pending.parquet"):
                with contextlib.suppress(OSError, pa.ArrowException):
                    for _ in range(pq.read_metadata(path).num_rows):
                        progress()
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


@dataclass(frozen=True)
class _Decode:
    """The step that reads and decodes, in tasks."""

    preprocessing: Preprocessing
    limits: ImageLimits

    def __call__(self, pictures: pa.Table) -> pa.Table:
        rows = pictures.to_pylist()
        tasks = [
            Decode(
                row["key"],
                Found(row["path"], row["member"], row["size"], row["mtime_ns"], row["offset"]),
                self.preprocessing,
                self.limits,
            )
            for row in rows
        ]
        outcomes = _decode(tasks)
        return pa.Table.from_pylist([_decoded(row, outcomes[row["key"]]) for row in rows], _DECODED_SCHEMA)


def _decode(tasks: list[Decode]) -> dict[int, Outcome]:
    try:
        return dict(_decoder().run(tasks))
    except BaseException:
        # What was under way must not come out for the next task.
        _decoder().__exit__()
        raise


@functools.cache
def _decoder() -> DecodePool:
    """The process that decodes for this one; it ends when this one does."""
    return DecodePool(1)


def _decoded(row: dict[str, Any], outcome: Outcome) -> dict[str, object]:
    start = {_ID: row[_ID], "key": row["key"]}
    if isinstance(outcome, Decoded):
        pixels = np.asarray(outcome.query).tobytes()
        return {**start, "content_hash": outcome.content_hash, "pixels": pixels, "decode_ms": outcome.decode_ms}
    if isinstance(outcome, Unusable):
        return {**start, "content_hash": outcome.content_hash, **asdict(outcome.failure)}
    assert isinstance(outcome, Failure)
    return {**start, **asdict(outcome)}


class _Locate:
    """The step that locates, in actors."""

    def __init__(self, cluster: Cluster, options: LocateOptions) -> None:
        import torch  # noqa: PLC0415

        # Ray gives each process one thread; how many there are decides how batches are cut and so how they are rounded.
        torch.set_num_threads(usable_cores())
        self._options = options
        self._opened = contextlib.ExitStack()
        self._engine = self._opened.enter_context(open_index(cluster.index, cluster.device, cluster.batch_size))

    def __call__(self, decoded: pa.Table) -> pa.Table:
        assert self._engine.preprocessing is not None
        side = self._engine.preprocessing.image_size
        rows = decoded.to_pylist()
        located = [row for row in rows if row["pixels"] is not None]
        queries: list[Query] = [np.frombuffer(row["pixels"], np.uint8).reshape(3, side, side) for row in located]
        outcomes = self._engine.locate(queries, self._options) if queries else []
        for row, outcome in zip(located, outcomes, strict=True):
            if isinstance(outcome, GeoSurgeError):
                row.update(asdict(Failure.of(outcome)))
            else:
                answer = essential(outcome, row["decode_ms"])
                row["response"] = location_to_response(answer, "").SerializeToString()
        return pa.Table.from_pylist(rows, _ANSWER_SCHEMA)


def _note_answers(ledger: Ledger, key: AnswerKey, asked: Asked, place: Path) -> None:
    """Notes in the ledger what came of the pictures; of a picture that has changed since, an answer is passed over."""
    wanted = np.sort(pq.read_table(place / "pictures", columns=[_ID])[_ID].to_numpy())
    for path in sorted((place / _ANSWERS).glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                is_wanted = np.isin(batch[_ID].to_numpy(), wanted)
                for row in batch.filter(pa.array(is_wanted)).to_pylist():
                    _note_answer(ledger, key, asked, row)
        ledger.commit()


def _note_answer(ledger: Ledger, key: AnswerKey, asked: Asked, row: dict[str, Any]) -> None:
    content_hash = row["content_hash"]
    if row["response"] is None:
        ledger.failed(row["key"], Failure(row["reason"], row["detail"], is_final=row["is_final"]), content_hash)
        return
    location = response_to_location(geolocation_pb2.LocateResponse.FromString(row["response"]))
    answer, location = ledger.answer(content_hash, key) or (ledger.add_answer(content_hash, key, location), location)
    ledger.located(row["key"], content_hash, answer, *asked.reason_to_withhold(location))
