from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from geosurge.archive.cluster import Cluster
from geosurge.archive.cluster.session import session
from geosurge.errors import ServiceError, UsageError

pytest.importorskip("ray", reason="needs the extra bulk: pip install 'geosurge[bulk]'")


def test_an_address_where_nobody_listens_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ServiceError, match=f"at 127.0.0.1:{port}: .*refused"), session(f"127.0.0.1:{port}"):
        pass


def test_without_ray_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'geosurge\[bulk\]'"):
        Cluster("", tmp_path, "cpu", 1)


def test_ray_chooses_among_gpus(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not cuda:1"):
        Cluster("", tmp_path, "cuda:1", 1)
