from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import wait_until
from support.tasks import Crashing, Endless, Fine, Hungry, Raising, Unlucky

from geosurge.archive import pool as module
from geosurge.archive.pool import TaskPool
from geosurge.archive.tasks import Failure, Looked, Outcome, Task
from geosurge.errors import StageCrashedError

SLOW_STARTS = """
import os, time

for number in range(2):
    try:
        open(f"{os.environ['STARTS']}/start{number}", "x").close()
    except FileExistsError:
        continue
    time.sleep(600)
"""
"""Runs in a process before anything else: the first two take for ever to start."""


def outcomes(pool: TaskPool, tasks: list[Task]) -> dict[int, Outcome]:
    pairs = list(pool.run(tasks))
    assert len(pairs) == len(tasks), "every task has one outcome"
    return dict(pairs)


def processes_of_pools() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.ZombieProcess):  # other tests' children that ended
            if "geosurge.archive.pool" in " ".join(process.cmdline()):
                found.append(process)
    return found


def process_of(outcome: Outcome) -> float:
    """The process that did a task `Fine`."""
    assert isinstance(outcome, Looked)
    assert outcome.position is not None
    return outcome.position.longitude_deg


def test_the_pool_does_every_task_once_and_only_pulls_what_it_can_hold() -> None:
    pulled = 0

    def tasks() -> Iterator[Task]:
        nonlocal pulled
        for key in range(300):
            pulled += 1
            yield Fine(key)

    seen, processes = [], set()
    with TaskPool(2) as pool:
        for key, outcome in pool.run(tasks()):
            seen.append(key)
            processes.add(process_of(outcome))
            assert pulled - len(seen) <= 2 * 8
    assert sorted(seen) == list(range(300))
    assert len(processes) == 2


def test_errors_become_failures_and_cost_nothing_else() -> None:
    with TaskPool(1) as pool:
        ended = outcomes(pool, [Fine(0), Raising(1), Raising(2, is_defect=True), Fine(3)])
    assert ended[1] == Failure("INPUT_NOT_READABLE", "the disk has gone", is_final=False)
    assert ended[2] == Failure(
        "INTERNAL", "the engine failed at this picture: ZeroDivisionError: a defect", is_final=False
    )
    assert process_of(ended[0]) == process_of(ended[3]), "it went on"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_picture_that_ends_its_process_fails_and_the_others_do_not(number: signal.Signals) -> None:
    with TaskPool(1) as pool:
        tasks: list[Task] = [Fine(key) for key in range(12)]
        tasks[1] = Crashing(1, number)
        ended = outcomes(pool, tasks)
    failure = ended.pop(1)
    assert isinstance(failure, Failure)
    assert (failure.name, failure.is_final) == ("DECODER_CRASHED", False)
    assert f"exit code -{number.value}), 2 times" in failure.detail
    assert all(isinstance(outcome, Looked) for outcome in ended.values())


def test_a_process_that_is_killed_by_chance_costs_no_picture(tmp_path: Path) -> None:
    with TaskPool(1) as pool:
        ended = outcomes(pool, [Fine(0), Crashing(1, once=tmp_path / "crashed"), Fine(2)])
    assert all(isinstance(outcome, Looked) for outcome in ended.values())


def test_processes_that_are_killed_all_the_time_cost_no_picture() -> None:
    ended, killed = set[int](), list[psutil.Process]()

    def tasks() -> Iterator[Task]:
        key = 0
        while len(killed) < 8:
            yield Fine(key)
            key += 1

    with TaskPool(2) as pool:
        suspects = set[int]()
        for key, outcome in pool.run(tasks()):
            assert isinstance(outcome, Looked)
            ended.add(key)
            # A picture that is hit twice fails, so those that may have been hit are let through before the next round.
            if suspects <= ended and len(ended) > len(suspects) + 100:
                suspects = set(range(max(ended) + 1 + 2 * 8))
                for process in processes_of_pools():
                    process.kill()
                    killed.append(process)
    assert ended == set(range(len(ended)))
    assert len(killed) >= 8


def test_a_picture_that_was_not_begun_is_no_suspect(tmp_path: Path) -> None:
    with TaskPool(1) as pool:
        ended = outcomes(pool, [Fine(0), Unlucky(1, tmp_path), Fine(2)])
    assert all(isinstance(outcome, Looked) for outcome in ended.values())
    assert len(list(tmp_path.iterdir())) == Unlucky.times


def test_a_process_that_is_killed_while_it_starts_costs_no_picture() -> None:
    def tasks() -> Iterator[Task]:
        yield Fine(0)
        (starting,) = processes_of_pools()
        starting.kill()
        yield from map(Fine, range(1, 20))

    with TaskPool(1) as pool:
        ended = dict(pool.run(tasks()))
    assert sorted(ended) == list(range(20))
    assert all(isinstance(outcome, Looked) for outcome in ended.values())


def test_processes_that_start_slowly_cost_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_STARTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("STARTS", str(tmp_path))
    # Long enough for a process to start in.
    monkeypatch.setattr(module, "MAX_SECONDS", 3.0)
    with TaskPool(1) as pool:
        ended = outcomes(pool, [Fine(0)])
    assert isinstance(ended[0], Looked)
    assert len(list(tmp_path.glob("start*"))) == 2


def test_processes_that_never_get_ready_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "MAX_SECONDS", 0.1)
    with (
        TaskPool(1) as pool,
        pytest.raises(StageCrashedError, match=r"5 decoding processes in a row had not begun a picture after"),
    ):
        outcomes(pool, [Fine(0)])


def test_a_picture_that_takes_for_ever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with TaskPool(1) as pool:
        assert isinstance(outcomes(pool, [Fine(0)])[0], Looked)
        # Long enough for a process to start in.
        monkeypatch.setattr(module, "MAX_SECONDS", 3.0)
        ended = outcomes(pool, [Fine(0), Endless(1), Fine(2)])
    failure = ended[1]
    assert isinstance(failure, Failure)
    assert failure.name == "DECODER_CRASHED"
    assert "took more than 3 s, 2 times" in failure.detail
    assert isinstance(ended[0], Looked)
    assert isinstance(ended[2], Looked)


def test_the_time_that_outcomes_wait_for_is_not_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is encoded nobody takes what was decoded."""
    with TaskPool(2) as pool:
        before = {process_of(outcome) for outcome in outcomes(pool, [Fine(0, 0.1), Fine(1, 0.1)]).values()}
        monkeypatch.setattr(module, "MAX_SECONDS", 1.0)
        after = set()
        for key, outcome in pool.run(Fine(key, 0.3 * (key % 2)) for key in range(8)):
            after.add(process_of(outcome))
            if key == 0:
                time.sleep(1.5)
    assert after == before, "none was ended"


def test_a_pool_that_is_left_leaves_no_process() -> None:
    with TaskPool(2) as pool:
        tasks: itertools.chain[Task] = itertools.chain([Fine(0)], (Endless(key) for key in range(1, 20)))
        key, _ = next(pool.run(tasks))
        assert key == 0
        processes = processes_of_pools()
        assert len(processes) == 2
    wait_until(lambda: not any(map(psutil.Process.is_running, processes)), "the processes end")


def test_a_pool_that_was_stopped_forgets_what_was_under_way_and_works_again() -> None:
    with TaskPool(1) as pool:
        under_way = pool.run([Fine(0), Fine(1), Fine(2)])
        assert next(under_way)[0] == 0
        pool.stop()
        assert sorted(outcomes(pool, [Fine(7)])) == [7]


def test_a_picture_that_takes_all_memory_fails_alone() -> None:
    with TaskPool(1) as pool:
        found = outcomes(pool, [Fine(0), Hungry(1, 2 * 2**30), Hungry(2, 6 * 2**30), Fine(3)])
    processes = {process_of(found[key]) for key in (0, 1, 3)}
    assert len(processes) == 1, "the process goes on"
    assert found[2] == Failure("DECODER_CRASHED", "the picture takes more than 4 GiB to decode; leave it out")
