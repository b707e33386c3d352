"""Runs store operations in processes that are killed between two file system steps; prints what each left behind.

Usage: ``python power_cuts.py OLD_BUNDLE NEW_BUNDLE WORK_DIRECTORY``. The steps are everything that the interpreter
reports of opening files to write, and of making, renaming and removing them below the store, and every flush to disk.
For each step of each operation a child process is killed with SIGKILL right before it. Standard output gets one JSON
object.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geosurge import store as stores
from geosurge.bundle import open_bundle
from geosurge.errors import GeoSurgeError

_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


class Steps:
    """Counts the steps below a directory and kills the process before one of them."""

    def __init__(self, directory: Path, kill_before: int | None) -> None:
        self.directory = os.fspath(directory)
        self.kill_before = kill_before
        self.trace: list[str] = []
        sys.addaudithook(self.audit)
        os.fsync = self.fsync

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            # Opening to read changes nothing, so that a cut before it is the cut before the next step.
            reading = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, str) and path.startswith(self.directory) and not reading:
                self.step(event, path)

    def fsync(self, descriptor: int) -> None:
        """Counts a flush; a killed process leaves what it wrote, flushed or not, so the disk need not be waited for."""
        self.step("fsync", os.fspath(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def step(self, event: str, path: str) -> None:
        if len(self.trace) == self.kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        self.trace.append(f"{event} {os.path.relpath(path, self.directory)}")


def in_child(operation: Callable[[], object], directory: Path, kill_before: int | None) -> tuple[bool, list[str]]:
    """Runs an operation in a forked child; returns whether it was killed, and the steps of one that was not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            steps = Steps(directory, kill_before)
            operation()
            os.write(writer, json.dumps(steps.trace).encode())
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - a child must never go on as its parent
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        output = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True, []
    if os.WEXITSTATUS(status) != 0:
        raise SystemExit("the operation failed")
    return False, json.loads(output)


def look(store: Path) -> dict[str, Any]:
    """What a reader sees of a store."""
    seen: dict[str, Any] = {}
    try:
        seen["opened"] = open_bundle(stores.resolve_bundle(store)).manifest.name
    except GeoSurgeError as error:
        seen["opened"] = str(error)
    seen["bundles"] = [(entry.name, entry.problem) for entry in stores.list_bundles(store)]
    return seen


def cut(operation: Callable[[Path], object], before: Path, work: Path, first: int = 0) -> dict[str, Any]:
    """Kills an operation before each step from ``first`` on; each time, looks at the store and tries again."""
    cuts: list[dict[str, Any]] = []
    for step in range(first, 10_000):
        store = shutil.copytree(before, work / str(step))
        killed, trace = in_child(lambda: operation(store), store, step)  # noqa: B023 - called at once
        after = look(store)
        if not killed:
            return {"trace": trace, "first": first, "cuts": cuts, "end": after}
        try:
            operation(store)
            again = look(store) | {"error": None}
        except GeoSurgeError as error:
            again = look(store) | {"error": str(error)}
        again["left"] = sorted(path.name for path in store.iterdir() if path.is_dir())
        cuts.append({"after": after, "again": again})
    raise SystemExit("the operation has no end")


def main(old: Path, new: Path, work: Path) -> None:
    """Cuts the power of a publication, a publication with activation, an activation and a rollback."""
    os.fsync = lambda _: None
    one, two, three = (work / name for name in ("one", "two", "three"))
    stores.publish(one, old, name="old", verify=False, activate=True)
    shutil.copytree(one, two)
    stores.publish(two, new, name="new", verify=False)
    shutil.copytree(two, three)
    stores.activate(three, "new")

    def publish(store: Path) -> None:
        stores.publish(store, new, name="new", verify=False)

    def publish_and_activate(store: Path) -> None:
        stores.publish(store, new, name="new", verify=False, activate=True)

    def activate(store: Path) -> None:
        stores.activate(store, "new")

    published = cut(publish, one, work / "publish")
    # The steps of publishing are the same whether activation follows or not.
    first = len(published["trace"])
    results = {
        "publish": published,
        "publish and activate": cut(publish_and_activate, one, work / "publish_and_activate", first),
        "activate": cut(activate, two, work / "activate"),
        "rollback": cut(stores.rollback, three, work / "rollback"),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
