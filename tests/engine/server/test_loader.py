from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from support.bundles import make_bundle, tiny_encoder

from geosurge.images import DEFAULT_LIMITS
from geosurge.server.loader import Loader, control_group_headrooms
from geosurge.server.versions import LoadProgress


def use_all_cores() -> None:
    torch.randn(512, 512) @ torch.randn(512, 512)


async def test_only_the_thread_that_encodes_keeps_a_team_of_openmp(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny", encoder=tiny_encoder())
    with ThreadPoolExecutor(1) as encoding:
        encoding.submit(use_all_cores).result()
        loader = Loader(encoding.submit, device="cpu", limits=DEFAULT_LIMITS, max_batch_size=4, scratch=tmp_path)
        try:
            await loader.needs(path)
            threads = psutil.Process().num_threads()
            handle = await loader.open("tiny", path, LoadProgress(), beside_traffic=False)
            assert psutil.Process().num_threads() == threads
            await loader.close(handle)
        finally:
            loader.stop()


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
