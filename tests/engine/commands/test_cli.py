from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main
from google.protobuf import json_format
from PIL import Image
from support.bundles import make_bundle, tiny_encoder
from support.secured import Authority, new_token, replace_file
from support.servers import background_server, encoded_image, settings_for

from geosurge import __version__
from geosurge.client import Client
from geosurge.commands import cli
from geosurge.commands.locate import BATCH_SIZE
from geosurge.settings import ServerSettings
from geosurge.store import publish
from geosurge.v1 import geolocation_pb2

COMMAND = (sys.executable, "-m", "geosurge.commands.cli")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GEOSURGE_")}
TIMEOUT = 250


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", encoder=tiny_encoder())


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[str]:
    with background_server(settings_for(bundle)) as address:
        yield address


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(encoded_image(seed))
    (folder / "broken.png").write_bytes(encoded_image(1)[:-200])
    (folder / "text.jpg").write_text("not an image")
    (folder / "folder").mkdir()
    return folder


def geosurge(*arguments: str | Path, stdin: bytes = b"", check: int = 0) -> subprocess.CompletedProcess[bytes]:
    """Runs the command in a process of its own and checks its exit code."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, env=ENVIRONMENT, timeout=TIMEOUT, check=False)
    assert done.returncode == check, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str, str]:
    """Runs the command in this process; returns exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["geosurge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output, errors = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, output, errors


def lines_of(output: bytes | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def assert_alike(one: Any, other: Any) -> None:
    """Equal but for what the timings are and what batching does to the last digits."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"timings"}:
            assert_alike(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_alike(left, right)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3)
    else:
        assert one == other


def test_json_is_a_line_an_input_and_the_same_in_process_and_from_a_server(
    bundle: Path, server: str, images: Path
) -> None:
    names = ["0.png", "missing.png", "folder", "1.png", "broken.png", "text.jpg", "2.png"]
    paths = [f"{images}/{name}" for name in names]
    options = ["--json", "--top-k", "2", "--h3-resolution", "3", "--confidence-level", "0.5"]
    here = lines_of(geosurge("locate", *paths, *options, "--index", bundle, check=1).stdout)
    there = lines_of(geosurge("locate", *paths, *options, "--server", server, check=1).stdout)

    assert [line["request_id"] for line in here] == paths
    failed = {line["request_id"].rpartition("/")[2]: line["error"] for line in here if "error" in line}
    assert {name: error["reason"] for name, error in failed.items()} == {
        "missing.png": "INPUT_NOT_READABLE",
        "folder": "INPUT_NOT_READABLE",
        "broken.png": "IMAGE_TRUNCATED",
        "text.jpg": "IMAGE_NOT_DECODABLE",
    }
    assert failed["folder"]["message"] == f"cannot read {images}/folder: Is a directory"
    answers = [line for line in here if "error" not in line]
    for answer in answers:
        response = json_format.ParseDict(answer, geolocation_pb2.LocateResponse())
        assert response.index_version == "tiny"
        assert response.location.confidence_level == 0.5
        assert response.location.h3_cell.startswith("83")
        assert [cell.level for cell in response.path] == [1, 2, 3]
        assert len(response.alternatives) == 2
        assert response.alternatives[0].token == response.path[-1].token
    assert_alike(here, there)


def test_the_rows_for_people_say_why_an_input_failed(server: str, images: Path) -> None:
    paths = [f"{images}/0.png", f"{images}/text.jpg", f"{images}/1.png"]
    done = geosurge("locate", *paths, "--server", server, check=1)
    rows = [line for line in done.stdout.decode().splitlines() if str(images) in line]
    assert len(rows) == 3
    assert [path in row for path, row in zip(paths, rows, strict=True)] == [True] * 3
    assert "IMAGE_NOT_DECODABLE" in rows[1]
    assert "km)" in rows[0]
    assert "km)" in rows[2]
    assert done.stderr == b""


def test_an_image_may_come_from_standard_input(server: str, images: Path) -> None:
    piped = geosurge("locate", "-", "--json", "--server", server, stdin=encoded_image(0))
    named = geosurge("locate", images / "0.png", "--json", "--server", server)
    [one], [other] = lines_of(piped.stdout), lines_of(named.stdout)
    assert one.pop("request_id") == "-"
    assert other.pop("request_id") == str(images / "0.png")
    assert_alike(one, other)


def test_search_options_reach_the_engine(
    server: str, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("locate", images / "0.png", "--json", "--server", server)
    code, output, _ = main(monkeypatch, capsys, *asked, "--exact", "--top-k", "100")
    [everywhere] = lines_of(output)
    assert code == 0
    assert len(everywhere["alternatives"]) == 20
    # The index's own beam of 8 leaves out a cell of level 2, with the leaves below it.
    for beam, complete in (((), False), (("--beam-width", "9"), True)):
        [line] = lines_of(main(monkeypatch, capsys, *asked, "--top-k", "100", *beam)[1])
        assert (len(line["alternatives"]) == 20) == complete

    tokens = [leaf["token"] for leaf in everywhere["alternatives"][-2:]]
    code, output, _ = main(monkeypatch, capsys, *asked, "--region", tokens[0], "--region", tokens[1])
    assert code == 0
    assert {leaf["token"] for leaf in lines_of(output)[0]["alternatives"]} == set(tokens)

    code, output, _ = main(monkeypatch, capsys, *asked, "--region", "nowhere")
    assert code == 1
    assert lines_of(output)[0]["error"]["reason"] == "REGION_CELL_UNKNOWN"


def test_a_thousand_inputs_are_answered_in_their_order(
    server: str, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"{images}/{number % 3}.png" if number % 10 else f"{images}/{number}" for number in range(1000)]
    code, output, _ = main(monkeypatch, capsys, "locate", "--json", "--server", server, "--top-k", "1", *paths)
    lines = lines_of(output)
    assert code == 1
    assert [line["request_id"] for line in lines] == paths
    assert [number for number, line in enumerate(lines) if "error" in line] == list(range(0, 1000, 10))


def test_an_index_in_process_is_asked_in_batches(
    bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"{images}/{number % 3}.png" for number in range(2 * BATCH_SIZE + 1)]
    code, output, _ = main(monkeypatch, capsys, "locate", "--json", "--index", bundle, *paths)
    lines = lines_of(output)
    assert code == 0
    assert [line["request_id"] for line in lines] == paths
    for line, first in zip(lines[3:], lines, strict=False):
        assert line["location"]["latitude_deg"] == pytest.approx(first["location"]["latitude_deg"], abs=1e-3)


def test_an_index_without_an_encoder_fails_each_input_with_the_reason(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "vectors")
    paths = (images / "0.png", images / "1.png")
    code, output, _ = main(monkeypatch, capsys, "locate", "--json", "--index", bundle, *paths)
    assert code == 1
    assert [line["error"]["reason"] for line in lines_of(output)] == ["ENCODER_MISSING"] * 2


def test_names_that_are_not_text_do_not_stop_the_others(server: str, images: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(encoded_image(0))
    command = [*COMMAND, "locate", "--json", "--server", server, odd, str(images / "1.png")]
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["request_id"] for line in lines_of(done.stdout)] == [f"{tmp_path}/\ufffd.png", f"{images}/1.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["locate"], 2, "IMAGE"),
        (["locate", "a.jpg", "--nonsense"], 2, "--nonsense"),
        (["locate", "a.jpg", "--top-k", "0"], 2, "--top-k"),
        (["locate", "a.jpg", "--confidence-level", "1"], 2, "less than 1"),
        (["locate", "a.jpg", "--h3-resolution", "16"], 2, "--h3-resolution"),
        (["locate", "a.jpg", "--exact", "--beam-width", "3"], 2, "--beam-width"),
        (["locate", "a.jpg", "--server", "localhost"], 2, "HOST:PORT"),
        (["locate", "a.jpg", "--server", "http://localhost:1"], 2, "HOST:PORT"),
        (["locate", "a.jpg", "--server", "localhost/x:1"], 2, "HOST:PORT"),
        (["locate", "a.jpg", "--server", "localhost:65536"], 2, "HOST:PORT"),
        (["locate", "-", "-"], 2, "more than once"),
        (["locate", "a.jpg", "--server", "localhost:1", "--index", "x"], 2, "leave out --index"),
        (["locate", "a.jpg", "--timeout", "3"], 2, "--server"),
        (["locate", "a.jpg", "--tls", "--token-file", "x"], 2, "--tls, --token-file: for reaching a server"),
        (["locate", "a.jpg", "--server", "localhost:1", "--tls-key", "x"], 2, "come together"),
        (["locate", "a.jpg", "--server", "localhost:1", "--tls-ca", "no/such/ca"], 2, "no/such/ca"),
        (["locate", "a.jpg", "--server", "localhost:1", "--token-file", "no/such/file"], 2, "no/such/file"),
        (["locate", "a.jpg", "--index", "no/such/index"], 3, "no/such/index"),
        (["locate", "a.jpg", "--server", "127.0.0.1:1", "--timeout", "2"], 3, "127.0.0.1:1"),
        (["serve", "--port", "70000"], 2, "--port"),
        (["serve", "--host", "0.0.0.0"], 2, "--allow-remote"),
        (["serve", "--tls-key", "no/such/key"], 2, "--tls-key"),
        (["serve", "--config", "no/such/file.toml"], 2, "no/such/file.toml"),
        (["serve", "--index", "no/such/index"], 3, "no/such/index"),
        (["demo", "--views", "no/such/views"], 2, "--views"),
        (["map", "no/such/results.jsonl", "--out", "x.png"], 2, "no/such/results.jsonl"),
        (["index", "list", "--store", "no/such/store"], 3, "no/such/store"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    code: int,
    said: str,
) -> None:
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(f"GEOSURGE_{name.upper()}", raising=False)
    ended, output, errors = main(monkeypatch, capsys, *arguments)
    assert ended == code
    assert output == ""
    assert said in re.sub(r"[\s│]+", " ", errors).replace("- ", "-") or said in errors
    assert "Traceback" not in errors


def test_credentials_reach_a_server_and_wrong_ones_are_explained(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, others = Authority(tmp_path / "authority"), Authority(tmp_path / "others")
    token, unknown = new_token(), new_token()
    tokens = replace_file(tmp_path / "tokens", f"locate:{token}")
    mine = replace_file(tmp_path / "mine", f"{token}\nnot a part of it\n")
    chain, key = authority.issue("client", "client.example")
    settings = settings_for(bundle, **authority.tls(), tls_client_ca=authority.ca_file, token_file=tokens)
    certificate = ("--tls-certificate", chain, "--tls-key", key)
    monkeypatch.setitem(ENVIRONMENT, "GEOSURGE_TOKEN", unknown)
    with background_server(settings) as address:
        ask = ("locate", images / "0.png", "--json", "--server", address)
        trusting = (*ask, "--tls-ca", authority.ca_file)
        done = geosurge(*trusting, *certificate, "--token-file", mine)
        assert lines_of(done.stdout)[0]["index_version"] == "tiny"
        refused = geosurge(*trusting, *certificate, check=2)
        assert b"does not know the token" in refused.stderr
        assert unknown.encode() not in refused.stderr
        untrusting = geosurge(*ask, "--tls-ca", others.ca_file, *certificate, check=3)
        assert untrusting.stderr.startswith(b"error: the certificate of the server at")
        assert untrusting.stderr.count(b"\n") == 1
        assert b"--tls-certificate" in geosurge(*trusting, check=3).stderr
        monkeypatch.setitem(ENVIRONMENT, "GEOSURGE_TOKEN", token)
        assert lines_of(geosurge(*trusting, *certificate).stdout)[0]["index_version"] == "tiny"


def test_exit_codes_are_those_of_the_process(images: Path) -> None:
    assert b"no such index" in geosurge("locate", images / "0.png", "--index", "no such index", check=3).stderr
    assert geosurge("locate", "--nonsense", check=2).stdout == b""
    assert geosurge("--version").stdout.decode() == f"geosurge {__version__}\n"


def test_the_place_in_the_code_is_shown_only_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("locate", "a.jpg", "--index", "no/such/index")
    code, _, errors = main(monkeypatch, capsys, "--debug", *arguments)
    assert code == 3
    assert "Traceback" in errors
    monkeypatch.setenv("GEOSURGE_DEBUG", "1")
    assert "Traceback" in main(monkeypatch, capsys, *arguments)[2]
    monkeypatch.setenv("GEOSURGE_DEBUG", "0")
    assert "Traceback" not in main(monkeypatch, capsys, *arguments)[2]


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (ZeroDivisionError("a fault"), 3)])
def test_an_interrupt_and_a_fault_have_exit_codes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("geosurge.commands.locate._ask_index", fail)
    ended, output, errors = main(monkeypatch, capsys, "locate", "a.jpg")
    assert ended == code
    assert output == ""
    assert ("a fault" in errors) == ("Traceback" in errors) == (code == 3)


def test_a_reader_that_leaves_early_ends_the_command_quietly(server: str, images: Path) -> None:
    command = [*COMMAND, "locate", "--json", "--server", server, *[str(images / "0.png")] * 500]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["index_version"] == "tiny"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(TIMEOUT) == cli.BROKEN_PIPE_EXIT_CODE
    assert errors == b""


@pytest.mark.parametrize("kind", ["help", "index", "server"])
def test_what_needs_no_model_does_not_load_one(
    kind: str, bundle: Path, server: str, images: Path, tmp_path: Path
) -> None:
    if kind == "index":
        publish(tmp_path / "store", bundle, verify=False)
    arguments = {
        "help": ["--help"],
        "index": ["index", "list", "--store", str(tmp_path / "store")],
        "server": ["locate", str(images / "0.png"), "--server", server],
    }[kind]
    program = (
        "import sys\n"
        "from geosurge.commands.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'faiss', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


def test_the_flags_of_serve_are_its_settings() -> None:
    commands: Any = typer.main.get_command(cli.app)
    options = {parameter.name: parameter for parameter in commands.commands["serve"].params}
    assert options.keys() == {"config", *ServerSettings.model_fields}
    for name in ServerSettings.model_fields:
        assert options[name].opts == [f"--{name.replace('_', '-')}"]
        assert options[name].default is None
        assert options[name].help == ServerSettings.model_fields[name].description


def test_a_server_says_where_it_serves_and_stops_on_sigterm(bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("max_batch_size = 3\nmax_image_bytes = 1234\nport = 1\n")
    command = [*COMMAND, "serve", "--index", str(bundle), "--config", str(config), "--port", "0"]
    environment = {**ENVIRONMENT, "GEOSURGE_MAX_IMAGE_BYTES": "5678"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        hung = threading.Timer(TIMEOUT, process.kill)
        hung.start()
        try:
            found = (re.fullmatch(rf"serving {bundle} on (\S+)\n", line.decode()) for line in process.stderr)
            ready = next(match for match in found if match)
            with Client(ready[1], timeout_seconds=60) as client:
                info = client.get_info()
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=60)
        finally:
            hung.cancel()
            process.kill()
    assert (info.index_version, info.max_batch_size, info.max_image_bytes) == ("tiny", 3, 5678)
    assert process.returncode == 0, errors.decode()
    assert output == b""


def test_answers_become_a_map(
    bundle: Path,
    server: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = (images / "0.png", images / "missing.png", images / "1.png")
    _, output, _ = main(monkeypatch, capsys, "locate", "--json", "--server", server, *paths)
    results, truth, out = (tmp_path / name for name in ("results.jsonl", "truth.csv", "map.png"))
    results.write_text(output)
    truth.write_text(f"path,latitude_deg,longitude_deg\n{images}/1.png,10,20\n")

    drawn = ("map", results, "--truth", truth, "--out", out)
    assert main(monkeypatch, capsys, *drawn, "--index", bundle)[:2] == (0, f"2 answers drawn to {out}\n")
    with Image.open(out) as picture:
        assert picture.format == "PNG"

    # Only where no index was named is it left out when there is none.
    assert main(monkeypatch, capsys, *drawn, "--index", tmp_path / "none")[0] == 3
    monkeypatch.setenv("GEOSURGE_INDEX", str(tmp_path / "none"))
    code, _, errors = main(monkeypatch, capsys, *drawn)
    assert code == 0
    assert "without land" in errors

    results.write_text("")
    code, _, errors = main(monkeypatch, capsys, *drawn)
    assert code == 2
    assert "no answer to draw" in errors
