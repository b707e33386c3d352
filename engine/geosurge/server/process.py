"""The process of a server: from its start to the signal, or the crash, that ends it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

from geosurge.errors import StageCrashedError
from geosurge.server.app import Server
from geosurge.server.logs import configure_logging
from geosurge.server.tracing import configure_tracing
from geosurge.settings import ServerSettings, unknown_variables

logger = logging.getLogger(__name__)

_LAST_SECONDS: Final = 10.0
"""Time that a server whose stage has crashed has after its grace, to free what it holds."""


def serve(settings: ServerSettings, on_ready: Callable[[Server], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then stops gracefully and returns; a second signal stops at once.

    A signal while the server is still starting ends the start; the bundle is never served then. SIGHUP has the server
    read the store's pointer again.

    Args:
        settings: The settings.
        on_ready: Called with the server once it reports SERVING.

    Raises:
        GeoSurgeError: The server could not start; see `Server.start`.
        StageCrashedError: It could not go on; it has stopped.
    """
    configure_logging(settings.log_level, settings.log_format)
    configure_tracing()
    for name, meant in unknown_variables(os.environ).items():
        logger.warning("%s in the environment is no setting%s", name, f"; did you mean {meant}?" if meant else "")
    asyncio.run(_serve(settings, on_ready))


async def _serve(settings: ServerSettings, on_ready: Callable[[Server], None] | None) -> None:
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    # The version that is loaded first may be another one than the store names by the end of the start.
    reload = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    _freeze_garbage_collector()
    server = Server(settings)
    signalled = asyncio.create_task(signals.get())
    if not await _start(server, signalled):
        return
    _freeze_garbage_collector()
    follow = _follower(server)
    loop.add_signal_handler(signal.SIGHUP, follow)
    if reload.is_set():
        follow()
    if on_ready is not None:
        on_ready(server)
    crashed = asyncio.create_task(server.crashed())
    await asyncio.wait({signalled, crashed}, return_when=asyncio.FIRST_COMPLETED)
    if crashed.done():
        stop = asyncio.create_task(server.stop(drain_seconds=0))
    else:
        logger.info("stopping", extra={"signal": signalled.result().name})
        stop = asyncio.create_task(server.stop())
        await _stop_or_crash(server, stop, crashed, signals)
    if crashed.done():
        await _end_after_crash(stop, crashed.result(), settings.grace_seconds + _LAST_SECONDS)
    crashed.cancel()
    await stop


async def _start(server: Server, signalled: asyncio.Task[signal.Signals]) -> bool:
    """Starts the server; returns whether it came to that before a signal ended the start."""
    start = asyncio.create_task(server.start())
    await asyncio.wait({start, signalled}, return_when=asyncio.FIRST_COMPLETED)
    if start.done():
        await start
        return True
    logger.info("stopping before the start was over", extra={"signal": signalled.result().name})
    start.cancel()
    with suppress(asyncio.CancelledError):
        await start
    return False


def _follower(server: Server) -> Callable[[], None]:
    """A signal handler that has the server follow its store."""
    # The event loop itself keeps no task alive.
    follows: set[asyncio.Task[None]] = set()

    def follow() -> None:
        task = asyncio.create_task(server.follow_store())
        follows.add(task)
        task.add_done_callback(follows.discard)

    return follow


async def _stop_or_crash(
    server: Server, stop: asyncio.Task[None], crashed: asyncio.Task[str], signals: asyncio.Queue[signal.Signals]
) -> None:
    """Waits until the server has stopped, or a stage has crashed meanwhile; one more signal shortens the stop."""
    again = asyncio.create_task(signals.get())
    await asyncio.wait({stop, again, crashed}, return_when=asyncio.FIRST_COMPLETED)
    if again.done():
        await server.abandon()
    await asyncio.wait({stop, crashed}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()


async def _end_after_crash(stop: asyncio.Task[None], stage: str, seconds: float) -> NoReturn:
    """Raises what tells a supervisor of the crash, once the server has stopped; ends the process if it does not."""
    failure = StageCrashedError(f"the stage {stage!r} crashed, see the log; start the server again")
    await asyncio.wait({stop}, timeout=seconds)
    if not stop.done():
        # A thread that hangs would keep the process, and the port with it, for ever.
        logger.critical("%s", failure)
        logging.shutdown()
        os._exit(failure.exit_code)
    raise failure


def _freeze_garbage_collector() -> None:
    """Has the garbage collector never again scan what exists now: hundreds of thousands of objects of libraries.

    A scan of all of them would stop every call for a quarter of a second. The last one is made here, before anything is
    served.
    """
    gc.collect()
    gc.freeze()
