from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from support.servers import running, settings_for

from geosurge.errors import ConfigurationError
from geosurge.server.app import Server
from geosurge.server.metrics import Metrics
from geosurge.server.monitoring import Monitoring


def get(address: str, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode(), dict(response.getheaders())
    finally:
        connection.close()


@pytest.fixture
def state() -> dict[str, bool]:
    return {"ready": False, "alive": True}


@pytest.fixture
def address(state: dict[str, bool]) -> Iterator[str]:
    monitoring = Monitoring(Metrics(), is_ready=lambda: state["ready"], is_alive=lambda: state["alive"])
    yield f"127.0.0.1:{monitoring.start('127.0.0.1', 0)}"
    monitoring.stop()


def test_probes_answer_what_the_server_says(address: str, state: dict[str, bool]) -> None:
    assert get(address, "/readyz")[:2] == (503, "Service Unavailable\n")
    assert get(address, "/livez")[:2] == (200, "OK\n")
    state.update(ready=True, alive=False)
    assert get(address, "/readyz?verbose")[0] == 200
    assert get(address, "/livez")[0] == 503


@pytest.mark.parametrize("path", ["/", "/metrics/", "/readyz/more", "/../metrics", "/%2e"])
def test_nothing_else_is_there(address: str, path: str) -> None:
    assert get(address, path)[0] == 404


def test_metrics_come_in_the_format_that_is_asked_for(address: str) -> None:
    status, text, headers = get(address, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert "# TYPE geosurge_calls_total counter" in text
    _, text, headers = get(address, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


def test_an_answer_does_not_say_what_runs_here(address: str) -> None:
    assert "Python" not in str(get(address, "/livez")[2])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_it_listens_where_it_is_told_until_it_is_stopped(host: str) -> None:
    monitoring = Monitoring(Metrics(), is_ready=lambda: True, is_alive=lambda: True)
    url = f"http://{f'[{host}]' if ':' in host else host}:{monitoring.start(host, 0)}/livez"
    with urlopen(url, timeout=10) as response:
        assert response.status == 200
    monitoring.stop()
    monitoring.stop()
    with pytest.raises(URLError):
        urlopen(url, timeout=10)


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.1", "no.such.host.invalid"])
def test_an_address_that_cannot_be_had_is_a_configuration_error(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monitoring = Monitoring(Metrics(), is_ready=lambda: True, is_alive=lambda: True)
        with pytest.raises(ConfigurationError, match="choose another metrics_port"):
            monitoring.start(host, taken.getsockname()[1])
        monitoring.stop()


def test_a_question_that_fails_is_logged_and_nothing_is_printed(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics()
    metrics.watch("queue_length", lambda: 1 / 0)
    monitoring = Monitoring(metrics, is_ready=lambda: True, is_alive=lambda: True)
    address = f"127.0.0.1:{monitoring.start('127.0.0.1', 0)}"
    with caplog.at_level(logging.INFO), pytest.raises(ConnectionError):
        get(address, "/metrics")
    assert get(address, "/livez")[0] == 200
    monitoring.stop()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "Traceback" not in capfd.readouterr().err


def test_one_that_leaves_in_the_middle_of_a_request_is_no_error(address: str, caplog: pytest.LogCaptureFixture) -> None:
    host, port = address.split(":")
    with caplog.at_level(logging.INFO):
        for sent in (b"", b"GET /metrics", b"GET /metrics HTTP/1.1\r\n\r\n", b"\xff\x00\r\n\r\n"):
            with socket.create_connection((host, int(port))) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                connection.sendall(sent)
        assert get(address, "/livez")[0] == 200
    assert not caplog.records


async def test_a_server_is_alive_before_it_is_ready_and_no_longer_ready_when_it_stops(bundle: Path) -> None:
    server = Server(settings_for(bundle, metrics_port=0))
    try:
        await server.listen()
        assert get(server.metrics_address, "/livez")[0] == 200
        assert get(server.metrics_address, "/readyz")[0] == 503
        await server.warm_up()
        assert get(server.metrics_address, "/readyz")[0] == 200
    finally:
        await server.stop(grace_seconds=0)
    with pytest.raises(ConnectionRefusedError):
        get(server.metrics_address, "/livez")


async def test_a_stuck_event_loop_is_not_alive_and_still_answered_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings_for(bundle, metrics_port=0)) as (server, _):
        assert get(server.metrics_address, "/livez")[0] == 200
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
        # Nothing is awaited in between, so that the event loop has no chance to say that it turns.
        assert get(server.metrics_address, "/livez")[0] == 503
        monkeypatch.undo()
        assert get(server.metrics_address, "/readyz")[0] == 200
