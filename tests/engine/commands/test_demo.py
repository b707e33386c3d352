from __future__ import annotations

import csv
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.bundles import make_bundle, tiny_encoder
from support.clients import free_port
from support.servers import encoded_image

from geosurge.client import Client, RetryPolicy
from geosurge.commands import demo_steps
from geosurge.commands.demo_steps import Outcome, View, default_views, locate_views, read_views, server_process, summary
from geosurge.description import Coordinate
from geosurge.errors import ImageEmptyError, ServiceError, UsageError
from geosurge.images import decode_image
from geosurge.location import CredibleRegion, Location
from geosurge.store import default_store

START_SECONDS = 250


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", encoder=tiny_encoder())


def write_truth(folder: Path, *rows: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "truth.csv").write_text("\n".join(["path,latitude_deg,longitude_deg", *rows, ""]))
    return folder


def located(latitude_deg: float, radius_km: float) -> Location:
    return Location(latitude_deg, 0.0, radius_km, 0.9, 0.5, (), (), CredibleRegion((), 0.0, 0.9), "tiny")


def test_the_demo_runs_from_end_to_end_and_says_what_failed(bundle: Path, tmp_path: Path) -> None:
    views = write_truth(tmp_path / "views", "first.png,10,20", "missing.png,30,40", "second.png,-50,-60")
    (views / "first.png").write_bytes(encoded_image(1))
    (views / "second.png").write_bytes(encoded_image(2))
    out = tmp_path / "maps" / "demo.png"
    command = [sys.executable, "-m", "geosurge.commands.cli", "demo"]
    command += ["--index", str(bundle), "--views", str(views), "--map", str(out)]
    # Settings in the environment are those of another server.
    environment = {**os.environ, "GEOSURGE_PORT": "1", "GEOSURGE_HOST": "0.0.0.0", "COLUMNS": "180"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 1, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    # A long reason goes on in rows without a name.
    first, missing, second = (row for row in rows if row.split("│")[1].strip())
    assert re.match("│ first +│ 10.00 N 20.00 E +│", first)
    assert re.match("│ missing +│ 30.00 N 40.00 E +│ INPUT_NOT_READABLE", missing)
    assert re.match("│ second +│ 50.00 S 60.00 W +│", second)
    assert "2 of 3 views located, median error " in done.stdout
    assert f"map: {out}\n" in done.stdout
    assert done.stdout.endswith("the server has stopped\n")
    with Image.open(out) as picture:
        assert picture.format == "PNG"


def test_the_server_is_gone_after_the_block_and_a_fault_in_it_is_not_hidden(bundle: Path) -> None:
    addresses = []

    def fail_while_serving() -> None:
        with server_process(bundle, start_seconds=START_SECONDS) as address, Client(address) as client:
            addresses.append(address)
            assert client.get_info(timeout_seconds=60).index_version == "tiny"
            raise ZeroDivisionError("a fault")

    with pytest.raises(ZeroDivisionError, match="a fault"):
        fail_while_serving()
    with Client(addresses[0], retry=RetryPolicy(max_attempts=1)) as client, pytest.raises(ServiceError):
        client.get_info()


def test_credentials_that_the_environment_holds_for_another_server_are_not_asked_for(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"locate:{'a' * 32}"
    (tmp_path / "tokens").write_text(lines)
    (tmp_path / "tokens").chmod(0o600)
    monkeypatch.setenv("GEOSURGE_TOKENS", lines)
    monkeypatch.setenv("GEOSURGE_TOKEN_FILE", str(tmp_path / "tokens"))
    monkeypatch.setenv("GEOSURGE_TLS_CERTIFICATE", str(tmp_path / "none.pem"))
    with server_process(bundle, start_seconds=START_SECONDS) as address, Client(address) as client:
        assert client.get_info(timeout_seconds=60).index_version == "tiny"


def test_ports_that_the_environment_asks_for_are_told_from_the_servers_own(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the server says that it listens, so do these.
    monkeypatch.setenv("GEOSURGE_METRICS_PORT", str(free_port()))
    monkeypatch.setenv("GEOSURGE_ADMIN_PORT", str(free_port()))
    with server_process(bundle, start_seconds=START_SECONDS) as address, Client(address) as client:
        assert client.get_info(timeout_seconds=60).index_version == "tiny"


def test_a_server_that_does_not_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ServiceError, match=r"(?s)did not start.*there is no index bundle"),
        server_process(tmp_path / "none"),
    ):
        pytest.fail("it must not start")


def test_a_server_that_takes_too_long_is_given_up(bundle: Path) -> None:
    with (
        pytest.raises(ServiceError, match=r"did not start within 0 s"),
        server_process(bundle, start_seconds=0.01),
    ):
        pytest.fail("it must not start in no time")


def test_views_that_are_not_there_are_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run the demo from a checkout .* --views"):
        read_views(tmp_path)
    with pytest.raises(UsageError, match="names no images"):
        read_views(write_truth(tmp_path))


def test_outside_a_checkout_the_views_are_looked_for_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo_steps, "__file__", str(tmp_path / "site-packages" / "geosurge" / "commands" / "demo_steps.py")
    )
    assert default_views() == Path("tests", "data", "views")


def test_the_summary_counts_what_was_located_and_what_lies_in_its_radius() -> None:
    view = View(Path("a.jpg"), Coordinate(0.0, 0.0))
    # A degree of latitude is 111.2 km.
    outcomes = [
        Outcome(view, located(1.0, 112.0)),
        Outcome(view, located(3.0, 333.0)),
        Outcome(view, located(4.0, 1.0)),
    ]
    failed = Outcome(view, ImageEmptyError("the image has no bytes"))
    assert summary([*outcomes, failed]) == "3 of 4 views located, median error 334 km, 1 inside their radius"
    assert summary([failed]) == "0 of 1 views located"
    assert failed.error_km is None


def test_the_sample_views_are_eight_small_pictures_with_their_truth() -> None:
    views = read_views(default_views())
    assert len(views) == 8
    assert {view.path for view in views} == set(default_views().glob("*.jpg"))
    for view in views:
        data = view.path.read_bytes()
        assert len(data) < 40_000
        assert decode_image(data).size == (384, 384)


def test_the_script_makes_the_sample_views(tmp_path: Path) -> None:
    script = runpy.run_path(str(default_views() / "make_views.py"))
    script["make_views"](tmp_path)
    assert (tmp_path / "truth.csv").read_bytes() == (default_views() / "truth.csv").read_bytes()
    for view in read_views(default_views()):
        with Image.open(view.path) as committed, Image.open(tmp_path / view.path.name) as made:
            # Other versions of the JPEG library may round differently.
            assert np.abs(np.asarray(committed, np.int64) - np.asarray(made)).mean() < 1.0
    with (tmp_path / "truth.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert 400.0 <= float(row["width_km"]) <= 900.0
            assert abs(float(row["rotation_deg"])) <= 20.0


def test_the_default_index_locates_the_sample_views() -> None:
    with server_process(default_store(), start_seconds=START_SECONDS) as address:
        outcomes = locate_views(address, read_views(default_views()))
    errors_km = {outcome.view.path.stem: outcome.error_km for outcome in outcomes}
    assert all(error is not None and error < 500.0 for error in errors_km.values()), errors_km
