from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from support.secured import INDEX_VERSION, Authority, new_token, replace_file, secured_server

from geosurge.client import AsyncClient, Client, RetryPolicy
from geosurge.client.connection import Connection, open_async_channel, open_channel
from geosurge.errors import (
    ConfigurationError,
    CredentialsExpiredError,
    CredentialsInvalidError,
    CredentialsMissingError,
    GeoSurgeError,
    PermissionDeniedError,
    ServiceError,
)
from geosurge.location import Location
from geosurge.settings import ServerSettings

LIST_VERSIONS = "/geosurge.v1.IndexService/ListVersions"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEOSURGE_TOKENS", raising=False)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"))


TOKEN, OLD_TOKEN = new_token(), new_token()


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[str]:
    """Asks for TLS, a client certificate and a token."""
    tokens = replace_file(authority.directory / "tokens", f"locate:{TOKEN}\nlocate:{OLD_TOKEN}:2020-02-29")
    settings = ServerSettings(**authority.tls(), tls_client_ca=authority.ca_file, token_file=tokens)
    with secured_server(settings) as address:
        yield address


@pytest.fixture(scope="module")
def connection(authority: Authority) -> Connection:
    chain, key = authority.issue("client", "client.example")
    return Connection(authority.ca_file, chain, key, TOKEN)


class _Once(RetryPolicy):
    """A policy whose use is a failure."""

    def pause_seconds(self, failed_attempts: int, remaining_seconds: float) -> float | None:
        raise AssertionError("the call was to be repeated")


QUICK = RetryPolicy(max_attempts=2, first_pause_seconds=0.01)


def failure_of(address: str, connection: Connection, retry: RetryPolicy = QUICK) -> GeoSurgeError:
    """What the clients raise, which is the same of both and of all their calls."""

    async def ask() -> list[GeoSurgeError]:
        raised = []
        async with AsyncClient(address, connection=connection, retry=retry) as client:
            with pytest.raises(GeoSurgeError) as caught:
                await client.get_info()
            raised.append(caught.value)
            with pytest.raises(GeoSurgeError) as caught:
                _ = [answer async for answer in client.locate_many([np.ones(3)])]
            raised.append(caught.value)
        return raised

    raised = asyncio.run(ask())
    with Client(address, connection=connection, retry=retry) as client:
        with pytest.raises(GeoSurgeError) as caught:
            client.get_info()
        raised.append(caught.value)
        with pytest.raises(GeoSurgeError) as caught:
            list(client.locate_many([np.ones(3)]))
        raised.append(caught.value)
    assert {type(error) for error in raised} == {type(raised[0])}
    assert not any(token in repr(raised) for token in (TOKEN, OLD_TOKEN))
    return raised[0]


def test_every_call_carries_the_credentials(server: str, connection: Connection) -> None:
    with Client(server, connection=connection) as client:
        assert client.get_info().index_version == INDEX_VERSION
        assert client.locate(b"image").index_version == INDEX_VERSION
        assert [type(answer) for answer in client.locate_many([np.ones(3)] * 100)] == [Location] * 100
        assert list(client.children()) == []


async def test_every_asynchronous_call_carries_the_credentials(server: str, connection: Connection) -> None:
    async with AsyncClient(server, connection=connection) as client:
        assert (await client.get_info()).index_version == INDEX_VERSION
        assert (await client.locate(b"image")).index_version == INDEX_VERSION
        answers = [answer async for answer in client.locate_many([np.ones(3)] * 100)]
        assert [type(answer) for answer in answers] == [Location] * 100
        async for _ in client.locate_many([np.ones(3)] * 100):
            break
        assert [cell async for cell in client.children()] == []


def test_a_token_works_without_tls_on_this_machine(tmp_path: Path) -> None:
    tokens = replace_file(tmp_path / "tokens", f"read:{TOKEN}")
    with secured_server(ServerSettings(token_file=tokens)) as address:
        for local in (address, address.replace("127.0.0.1", "localhost")):
            with Client(local, connection=Connection(token=TOKEN)) as client:
                assert client.get_info().index_version == INDEX_VERSION
        with open_channel(address, Connection(token=TOKEN)) as channel:
            channel.unary_unary(LIST_VERSIONS)(b"")


def test_a_token_does_not_cross_a_network_in_plain_text(authority: Authority) -> None:
    for address in (
        "192.0.2.1:50051",
        "[2001:db8::1]:50051",
        "example.org:50051",
        "localhost.example.org:1",
        "nonsense",
    ):
        for opened in (open_channel, open_async_channel):
            with pytest.raises(ConfigurationError, match=r"would cross the network in plain text.*--tls") as caught:
                opened(address, Connection(token=TOKEN))
            assert address in str(caught.value)
            assert TOKEN not in str(caught.value)
        open_channel(address, Connection(token=TOKEN, ca_file=authority.ca_file)).close()
        open_channel(address, Connection(token=TOKEN, tls=True)).close()


def test_the_system_s_authorities_are_trusted_when_told_to(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with secured_server(ServerSettings(**authority.tls())) as address:
        assert "not trusted" in str(failure_of(address, Connection(tls=True)))
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
        with Client(address, connection=Connection(tls=True)) as client:
            assert client.get_info().index_version == INDEX_VERSION


@pytest.mark.parametrize("token", ["", " ", "locate:abc", "two words", "line\nline", "größe", "a\x00b", '"quoted"'])
def test_what_is_no_token_is_refused_and_not_quoted(token: str) -> None:
    with pytest.raises(ConfigurationError, match="give the token alone") as caught:
        Connection(token=token)
    assert len(token) < 2 or token not in str(caught.value)


def test_a_connection_does_not_show_its_token(connection: Connection) -> None:
    assert TOKEN not in repr(connection)
    assert TOKEN not in str([connection])


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    chain, key = authority.issue("client")
    with pytest.raises(ConfigurationError, match="come together"):
        Connection(certificate_file=chain)
    with pytest.raises(ConfigurationError, match="come together"):
        Connection(key_file=key)
    junk = replace_file(tmp_path / "junk.pem", "junk")
    for wrong, named in (
        (Connection(ca_file=junk), junk),
        (Connection(ca_file=tmp_path / "none"), tmp_path / "none"),
        (Connection(certificate_file=chain, key_file=junk), junk),
        (Connection(certificate_file=chain, key_file=tmp_path), tmp_path),
    ):
        with pytest.raises(ConfigurationError, match=str(named)):
            Client("127.0.0.1:1", connection=wrong)


def test_refused_tokens_say_what_to_do_and_are_not_tried_again(server: str, connection: Connection) -> None:
    for token, expected, said in (
        (None, CredentialsMissingError, "--token-file or GEOSURGE_TOKEN"),
        (new_token(), CredentialsInvalidError, "does not know the token"),
        (OLD_TOKEN, CredentialsExpiredError, "valid until 2020-02-29"),
    ):
        error = failure_of(server, replace(connection, token=token), _Once())
        assert type(error) is expected
        assert said in str(error)
        assert (error.grpc_code, error.exit_code) == ("UNAUTHENTICATED", 2)


def test_a_refusal_by_something_in_between_is_told_apart_by_its_code() -> None:
    for code, expected in (
        (grpc.StatusCode.UNAUTHENTICATED, CredentialsMissingError),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError),
        (grpc.StatusCode.UNIMPLEMENTED, ServiceError),
    ):
        with _refusing_proxy(code) as address:
            error = failure_of(address, Connection(), _Once())
        assert type(error) is expected
        assert address in str(error)
        assert "by the proxy" in str(error)


@contextmanager
def _refusing_proxy(code: grpc.StatusCode) -> Iterator[str]:
    """A server that ends every call with a status of its own, without the engine's details."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            return grpc.stream_stream_rpc_method_handler(lambda _, context: context.abort(code, "by the proxy"))

    server = grpc.server(ThreadPoolExecutor(), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_too_low_a_role_is_told_apart(server: str, connection: Connection) -> None:
    with open_channel(server, connection) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(LIST_VERSIONS)(b"")
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "needs a token of the role read, and this one's is locate" in caught.value.details()


def test_a_failed_handshake_says_what_to_do_and_is_not_tried_again(
    server: str, connection: Connection, others: Authority
) -> None:
    with secured_server(ServerSettings()) as plain:
        no_tls = failure_of(plain, replace(connection, token=None), _Once())
    assert f"{plain} does not speak TLS" in str(no_tls)
    not_trusted = failure_of(server, replace(connection, ca_file=others.ca_file), _Once())
    assert f"{server} is not trusted (unable to get local issuer certificate)" in str(not_trusted)
    assert "--tls-ca" in str(not_trusted)
    with secured_server(ServerSettings(**others.tls("elsewhere", "elsewhere.example"))) as misnamed:
        other_name = failure_of(misnamed, Connection(ca_file=others.ca_file), _Once())
    assert f"{misnamed} was issued for another name" in str(other_name)
    for error in (no_tls, not_trusted, other_name):
        assert type(error) is ServiceError
        assert (error.grpc_code, error.exit_code) == ("UNAVAILABLE", 3)


def test_a_server_that_hangs_up_may_want_what_the_connection_lacks(
    server: str, connection: Connection, authority: Authority, others: Authority
) -> None:
    chain, key = others.issue("client", "client.example")
    for tried, said in (
        (Connection(), "if it speaks TLS, give its authority as ca_file (--tls-ca)"),
        (Connection(ca_file=authority.ca_file), "if it asks for a client certificate, give one (--tls-certificate"),
        (replace(connection, certificate_file=chain, key_file=key), f"it may not trust {chain}"),
    ):
        error = failure_of(server, tried)
        assert type(error) is ServiceError
        assert f"{server} cannot be reached" in str(error)
        assert said in str(error)
