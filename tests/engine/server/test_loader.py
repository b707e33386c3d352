from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
from support.bundles import make_bundle, tiny_encoder
from support.limits import limited
from support.processes import wait_until

from geosurge.errors import BundlePartialError, LoadImpossibleError
from geosurge.images import DEFAULT_LIMITS
from geosurge.locator import Locator
from geosurge.server.handle import LoadProgress
from geosurge.server.loader import (
    Loader,
    _private_directory,
    _remove_abandoned_copies,
    control_group_headrooms,
    warm_up,
)


def use_all_cores() -> None:
    torch.randn(512, 512) @ torch.randn(512, 512)


def native_threads() -> int:
    """Threads of this process that Python has not started, as those of OpenMP."""
    return psutil.Process().num_threads() - threading.active_count()


async def test_only_the_thread_that_encodes_keeps_a_team_of_openmp(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny", encoder=tiny_encoder())
    with ThreadPoolExecutor(1) as encoding:
        encoding.submit(use_all_cores).result()
        loader = Loader(encoding.submit, device="cpu", limits=DEFAULT_LIMITS, max_batch_size=4, scratch=tmp_path)
        try:
            await loader.needs(path)
            threads = native_threads()
            handle = await loader.open("tiny", path, LoadProgress(), beside_traffic=False)
            # The members of a team end soon after their thread has.
            wait_until(lambda: native_threads() <= threads, "the team of the loading thread ended")
            await loader.close(handle)
        finally:
            loader.stop()


@pytest.mark.parametrize(("useful", "encoded"), [(1, [1]), (3, [1, 3]), (8, [1, 4])])
def test_a_warm_up_encodes_what_the_encoder_will_get_and_searches_a_whole_batch(
    useful: int, encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Locator.open(make_bundle(tmp_path / "tiny", encoder=tiny_encoder())) as locator:
        encode, search = Mock(wraps=locator.encode), Mock(wraps=locator.locate_embeddings)
        monkeypatch.setattr(locator, "encode", encode)
        monkeypatch.setattr(locator, "locate_embeddings", search)
        monkeypatch.setattr(locator.encoder, "useful_batch_size", lambda limit: min(limit, useful))
        warm_up(locator, 4)
        assert [len(call.args[0]) for call in encode.mock_calls] == encoded
        assert [len(call.args[0]) for call in search.mock_calls] == [1, 4]
        warm_up(locator, 4, encode=False)
        assert (encode.call_count, search.call_count) == (len(encoded), 4)


def test_every_control_group_with_a_limit_counts_and_cached_files_are_free(tmp_path: Path) -> None:
    root, membership = tmp_path / "groups", tmp_path / "membership"
    unit = root / "system.slice" / "geosurge.service"
    unit.mkdir(parents=True)
    for group, limit in ((root, "1"), (unit.parent, "max"), (unit, "5000")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("3000\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 700\n")
    membership.write_text("4:memory:/elsewhere\n0::/system.slice/geosurge.service\n")
    assert list(control_group_headrooms(root, membership)) == [2700, -2299]
    assert list(control_group_headrooms(tmp_path / "none", membership)) == []
    membership.write_text("0::/\n")
    assert list(control_group_headrooms(root, membership)) == [-2299]


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[Loader]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with ThreadPoolExecutor(1) as encoding:
        loader = Loader(encoding.submit, device="cpu", limits=DEFAULT_LIMITS, max_batch_size=4, scratch=scratch)
        yield loader
        loader.stop()


async def test_a_bundle_is_not_blamed_for_the_machine(loader: Loader, tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny")
    with limited(resource.RLIMIT_FSIZE, 3000), pytest.raises(LoadImpossibleError, match=r"scratch cannot be.*File"):
        await loader.open("tiny", path, LoadProgress(), beside_traffic=False)
    with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(LoadImpossibleError, match="limit of open files"):
        await loader.needs(path)
    await loader.close(await loader.open("tiny", path, LoadProgress(), beside_traffic=False))
    (tmp_path / "scratch").rmdir()
    with pytest.raises(LoadImpossibleError, match=r"scratch cannot be made.*No such"):
        await loader.open("tiny", path, LoadProgress(), beside_traffic=False)


class Removal(LoadProgress):
    """Removes files as soon as the first byte is read."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self.files = files

    def report(self, step: str, fraction: float) -> None:
        if fraction > 0:
            for file in self.files:
                file.unlink(missing_ok=True)
        super().report(step, fraction)


async def test_a_bundle_is_blamed_for_its_own_files(loader: Loader, tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny")
    with pytest.raises(BundlePartialError, match=r"\.faiss vanished"):
        await loader.open("tiny", path, Removal(list(path.glob("*.faiss"))), beside_traffic=False)


def test_copies_of_dead_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "geosurge-load-abandoned").mkdir()
    enough = threading.Event()

    def clean() -> None:
        while not enough.is_set():
            _remove_abandoned_copies(tmp_path)

    with ThreadPoolExecutor(1) as cleaning:
        cleaned = cleaning.submit(clean)
        try:
            for _ in range(1000):
                with _private_directory(tmp_path) as directory:
                    assert directory.exists()
        finally:
            enough.set()
        cleaned.result()
    assert list(tmp_path.iterdir()) == []
