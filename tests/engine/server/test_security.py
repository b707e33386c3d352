from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.secured import Authority, new_token, replace_file, secured_server, services

from geosurge.client.connection import Connection, open_channel
from geosurge.errors import ConfigurationError, CredentialsExpiredError
from geosurge.server.security import REQUIRED_ROLES, AuthInterceptor, Role, Tokens, server_credentials
from geosurge.settings import ServerSettings
from geosurge.wire import status_to_error

GET_INFO = "/geosurge.v1.GeolocationService/GetInfo"
LOCATE_STREAM = "/geosurge.v1.GeolocationService/LocateStream"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GEOSURGE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def tokens() -> dict[Role, str]:
    return {role: new_token() for role in Role}


@pytest.fixture
def token_file(tmp_path: Path, tokens: dict[Role, str]) -> Path:
    lines = [f"{role.name.lower()}:{token}" for role, token in tokens.items()]
    return replace_file(tmp_path / "tokens", "\n".join(["# who may call", "", *lines]))


@pytest.fixture
def guarded(token_file: Path) -> Iterator[str]:
    with secured_server(ServerSettings(token_file=token_file)) as address:
        yield address


def ask(address: str, method: str = GET_INFO, connection: Connection | None = None, metadata: Any = ()) -> Any:
    """Calls a method with an empty message; returns the status code, and the reason where there is one."""
    with open_channel(address, connection) as channel:
        try:
            if "Stream" in method or method == REFLECTION:
                answers = channel.stream_stream(method)(iter([b""]), metadata=metadata, timeout=30)
                assert len(list(answers)) == 1
            else:
                channel.unary_unary(method)(b"", metadata=metadata, timeout=30)
        except grpc.RpcError as failure:
            details = dict(failure.trailing_metadata() or ()).get("grpc-status-details-bin")
            if details is None:
                return failure.code().name, failure.details()
            return failure.code().name, status_to_error(status_pb2.Status.FromString(details)).reason
    return "OK", ""


def bearing(token: str) -> Connection:
    return Connection(token=token)


def test_every_method_of_every_service_has_a_role() -> None:
    offered = [
        *services(),
        *health_pb2.DESCRIPTOR.services_by_name.values(),
        *reflection_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    methods = {f"/{service.full_name}/{method.name}" for service in offered for method in service.methods}
    assert methods - REQUIRED_ROLES.keys() == set()
    assert {method for method in REQUIRED_ROLES if method.startswith("/geosurge.")} <= methods
    assert {method for method, role in REQUIRED_ROLES.items() if role is None} <= {
        f"/grpc.health.v1.Health/{name}" for name in ("Check", "List", "Watch")
    }


@pytest.mark.parametrize("role", Role)
def test_a_role_may_call_what_needs_it_or_a_lesser_one(guarded: str, tokens: dict[Role, str], role: Role) -> None:
    for method, required in REQUIRED_ROLES.items():
        if required is not None:
            expected = ("OK", "") if role >= required else ("PERMISSION_DENIED", "PERMISSION_DENIED")
            assert ask(guarded, method, bearing(tokens[role])) == expected, method


def test_a_method_that_is_not_listed_is_for_administrators(guarded: str, tokens: dict[Role, str]) -> None:
    for method in ("/geosurge.v1.IndexService/Forget", "/other.Service/Method", "/nonsense"):
        assert ask(guarded, method) == ("UNAUTHENTICATED", "CREDENTIALS_MISSING")
        assert ask(guarded, method, bearing(tokens[Role.READ])) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
        assert ask(guarded, method, bearing(tokens[Role.ADMIN]))[0] == "UNIMPLEMENTED"


def test_health_is_open_and_reflection_is_not(guarded: str, tokens: dict[Role, str]) -> None:
    with open_channel(guarded) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        assert next(health.Watch(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    assert ask(guarded, REFLECTION) == ("UNAUTHENTICATED", "CREDENTIALS_MISSING")
    with open_channel(guarded, bearing(tokens[Role.LOCATE])) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        assert next(stub.ServerReflectionInfo(iter([request]))).HasField("list_services_response")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "CREDENTIALS_MISSING"),
        ("", "CREDENTIALS_MISSING"),
        ("Bearer", "CREDENTIALS_MISSING"),
        ("Bearer ", "CREDENTIALS_MISSING"),
        ("{token}", "CREDENTIALS_MISSING"),
        ("Basic {token}", "CREDENTIALS_MISSING"),
        ("Bearer wrong", "CREDENTIALS_INVALID"),
        ("Bearer admin:{token}", "CREDENTIALS_INVALID"),
        ("Bearer {token}0", "CREDENTIALS_INVALID"),
        ("Bearer {token:.63}", "CREDENTIALS_INVALID"),
        ("Bearer {token} {token}", "CREDENTIALS_INVALID"),
        ("bearer {token}", None),
        ("Bearer {token}", None),
    ],
)
def test_the_header_must_be_a_known_token(
    guarded: str, tokens: dict[Role, str], header: str | None, reason: str | None
) -> None:
    metadata = [] if header is None else [("authorization", header.format(token=tokens[Role.ADMIN]))]
    expected = ("OK", "") if reason is None else ("UNAUTHENTICATED", reason)
    assert ask(guarded, GET_INFO, metadata=metadata) == expected
    assert ask(guarded, LOCATE_STREAM, metadata=metadata) == expected


def test_two_tokens_are_none(guarded: str, tokens: dict[Role, str]) -> None:
    metadata = [("authorization", f"Bearer {token}") for token in tokens.values()]
    assert ask(guarded, metadata=metadata) == ("UNAUTHENTICATED", "CREDENTIALS_MISSING")


def test_a_stream_is_refused_before_it_sends_anything(guarded: str) -> None:
    over = threading.Event()

    def silent() -> Iterator[bytes]:
        over.wait()
        yield b""

    with open_channel(guarded) as channel, pytest.raises(grpc.RpcError) as caught:
        next(channel.stream_stream(LOCATE_STREAM)(silent(), timeout=30))
    over.set()
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_token_is_valid_through_its_last_day_and_says_so_later(tmp_path: Path) -> None:
    today = datetime.now(UTC).date()
    fresh, old = new_token(), new_token()
    lines = f"locate:{fresh}:{today + timedelta(days=1)}\nadmin:{old}:{today - timedelta(days=1)}  # until yesterday\n"
    file = replace_file(tmp_path / "tokens", lines)
    assert Tokens(file=file).role_of(fresh) is Role.LOCATE
    with pytest.raises(CredentialsExpiredError, match=str(today - timedelta(days=1))):
        Tokens(file=file).role_of(old)
    with secured_server(ServerSettings(token_file=file)) as address:
        assert ask(address, connection=bearing(fresh)) == ("OK", "")
        assert ask(address, connection=bearing(old)) == ("UNAUTHENTICATED", "CREDENTIALS_EXPIRED")


def test_tokens_come_from_the_file_and_from_the_environment(
    token_file: Path, tokens: dict[Role, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not Tokens.from_settings(ServerSettings()).required
    other = new_token()
    monkeypatch.setenv("GEOSURGE_TOKENS", f"# here too\nREAD:{other}\n")
    assert Tokens.from_settings(ServerSettings()).role_of(tokens[Role.ADMIN]) is None
    both = Tokens.from_settings(ServerSettings(token_file=token_file))
    assert both.required
    assert both.role_of(other) is Role.READ
    assert {role: both.role_of(token) for role, token in tokens.items()} == {role: role for role in Role}
    monkeypatch.setenv("GEOSURGE_TOKENS", "")
    with pytest.raises(ConfigurationError, match="GEOSURGE_TOKENS holds no token"):
        Tokens.from_settings(ServerSettings())


def test_without_tokens_every_call_is_let_through() -> None:
    with secured_server(ServerSettings()) as address:
        for method, role in REQUIRED_ROLES.items():
            assert role is None or ask(address, method) == ("OK", "")
        assert ask(address, connection=bearing("whatever")) == ("OK", "")


def test_a_changed_token_file_is_read_again_and_a_broken_one_changes_nothing(
    guarded: str, token_file: Path, tokens: dict[Role, str], caplog: pytest.LogCaptureFixture
) -> None:
    old, new, last = tokens[Role.LOCATE], new_token(), new_token()
    invalid = ("UNAUTHENTICATED", "CREDENTIALS_INVALID")
    assert ask(guarded, connection=bearing(old)) == ("OK", "")
    replace_file(token_file, f"locate:{new}")
    assert ask(guarded, connection=bearing(old)) == invalid
    assert ask(guarded, connection=bearing(new)) == ("OK", "")
    for break_it in (
        lambda: token_file.write_text("nonsense"),
        lambda: token_file.write_text(""),
        lambda: replace_file(token_file, f"locate:{last}", mode=0o644),
        token_file.unlink,
    ):
        caplog.clear()
        break_it()
        assert [ask(guarded, connection=bearing(token)) for token in (new, new, last)] == [("OK", "")] * 2 + [invalid]
        assert [str(token_file) in message for message in messages(caplog, logging.WARNING)] == [True]
    replace_file(token_file, f"locate:{last}", mode=0o644)
    token_file.chmod(0o600)
    assert ask(guarded, connection=bearing(last)) == ("OK", "")


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """What the module under test logged at a level."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == level and record.name == "geosurge.server.security"
    ]


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o602, 0o620, 0o601])
def test_a_token_file_that_others_have_a_hand_in_is_refused(token_file: Path, mode: int) -> None:
    token_file.chmod(mode)
    with pytest.raises(ConfigurationError, match=rf"{token_file} .*mode {mode:04o}.*chmod 600 {token_file}"):
        Tokens(file=token_file)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{token}", "line 2: it does not start with a role"),
        ("root:{token}", "line 2: it does not start with a role"),
        ("admin:", "line 2: the token must be 16 or more"),
        ("admin:{token:.15}", "line 2: the token must be 16 or more"),
        ("admin:{token} {token}", "line 2: the token must be 16 or more"),
        ("admin:{token}ü", "line 2: the token must be 16 or more"),
        ("admin:{token}:soon", "line 2: the last field is not a date"),
        ("admin:{token}:2027-02-30", "line 2: the last field is not a date"),
        ("admin:{token}\nlocate:{token}", "holds a token twice"),
        ("# {token}", "holds no token"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number_and_not_quoted(tmp_path: Path, line: str, expected: str) -> None:
    token = new_token()
    file = replace_file(tmp_path / "tokens", "\n" + line.format(token=token))
    with pytest.raises(ConfigurationError, match=expected) as caught:
        Tokens(file=file)
    shown = [caught.value, caught.value.__cause__, str(caught.value), repr(caught.value)]
    assert token[:15] not in repr(shown)
    assert str(file) in str(caught.value)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not text"):
        Tokens(file=replace_file(tmp_path / "tokens", b"\xff" * 40))
    with pytest.raises(ConfigurationError, match="cannot read the token file"):
        Tokens(file=tmp_path / "none")


def test_no_token_is_logged_or_shown(
    guarded: str, token_file: Path, tokens: dict[Role, str], caplog: pytest.LogCaptureFixture
) -> None:
    secret, wrong = new_token(), new_token()
    caplog.set_level(logging.DEBUG)
    shown = [Tokens(file=token_file), vars(Tokens(file=token_file)), AuthInterceptor(Tokens(file=token_file))]
    failures = []
    for token in (*tokens.values(), wrong):
        for method in (GET_INFO, LOCATE_STREAM, "/geosurge.v1.IndexService/LoadVersion"):
            failures.append(ask(guarded, method, bearing(token)))
            failures.append(ask(guarded, method, metadata=[("authorization", token)]))
        with open_channel(guarded, bearing(token)) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/no/method")(b"")
        failures.append((caught.value.details(), caught.value.debug_error_string(), repr(caught.value)))
    for content in (f"locate:{secret}", f"nonsense:{secret}", f"read:{secret}:{secret}"):
        replace_file(token_file, content)
        failures.append(ask(guarded, connection=bearing(secret)))
    assert len(caplog.records) > 10
    everything = caplog.text + repr([vars(record) for record in caplog.records]) + repr(failures) + repr(shown)
    for token in (*tokens.values(), secret, wrong):
        assert token not in everything


def presented(address: str, authority: Authority) -> bytes:
    """The certificate that a server shows to a new connection."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
    assert shown is not None
    return shown


def first_certificate(file: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(
        file.read_text().partition("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----"
    )


def test_a_renewed_certificate_is_shown_to_new_connections(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = ServerSettings(**authority.tls())
    file = settings.tls_certificate
    assert file is not None
    connection = Connection(ca_file=authority.ca_file)
    with secured_server(settings) as address, open_channel(address, connection) as channel:
        call = channel.unary_unary(GET_INFO)
        call(b"")
        first = first_certificate(file)
        assert presented(address, authority) == first
        authority.issue("server")
        assert presented(address, authority) == first_certificate(file) != first
        assert presented(address, authority) == first_certificate(file)
        assert len(messages(caplog, logging.INFO)) == 1
        # A connection that is open goes on.
        call(b"")
        assert ask(address, connection=connection) == ("OK", "")


def test_broken_tls_files_leave_the_certificate_in_use_and_are_reported_once(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ServerSettings(**authority.tls())
    chain, key = settings.tls_certificate, settings.tls_key
    assert chain is not None
    assert key is not None
    other_chain, other_key = authority.issue("other")
    before = first_certificate(chain)
    with secured_server(settings) as address:
        for break_it in (
            lambda: replace_file(chain, other_chain.read_bytes()),
            lambda: replace_file(chain, "-----BEGIN CERTIFICATE-----\n"),
            lambda: replace_file(key, ""),
            chain.unlink,
            key.unlink,
        ):
            caplog.clear()
            break_it()
            assert [presented(address, authority) for _ in range(3)] == [before] * 3
            assert len(messages(caplog, logging.WARNING)) == 1
            assert str(chain) in messages(caplog, logging.WARNING)[0]
        other_key.replace(key)
        other_chain.replace(chain)
        assert presented(address, authority) == first_certificate(chain) != before


def test_a_client_needs_a_certificate_of_the_authority_that_the_server_trusts(
    authority: Authority, tmp_path: Path
) -> None:
    others = Authority(tmp_path / "others")
    trusted = replace_file(tmp_path / "clients.pem", authority.ca_file.read_bytes())
    settings = ServerSettings(**authority.tls(), tls_client_ca=trusted)

    def outcome(address: str, issuer: Authority | None) -> str:
        chain, key = (None, None) if issuer is None else issuer.issue("client", "client.example")
        return str(ask(address, connection=Connection(authority.ca_file, chain, key))[0])

    with secured_server(settings) as address:
        assert outcome(address, authority) == "OK"
        assert outcome(address, others) == "UNAVAILABLE"
        assert outcome(address, None) == "UNAVAILABLE"
        replace_file(trusted, others.ca_file.read_bytes())
        assert outcome(address, others) == "OK"
        assert outcome(address, authority) == "UNAVAILABLE"
        assert outcome(address, None) == "UNAVAILABLE"
        replace_file(trusted, "")
        assert outcome(address, others) == "OK"
        assert outcome(address, None) == "UNAVAILABLE"


def test_a_tls_port_outlives_those_who_do_not_speak_it(authority: Authority) -> None:
    with secured_server(ServerSettings(**authority.tls())) as address, ExitStack() as stack:
        host, _, port = address.rpartition(":")
        stack.enter_context(socket.create_connection((host, int(port))))
        for words in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\xff\xff",
            bytes(9999),
        ):
            stack.enter_context(socket.create_connection((host, int(port)))).sendall(words)
            assert ask(address)[0] == "UNAVAILABLE"
            assert ask(address, connection=Connection(ca_file=authority.ca_file)) == ("OK", "")


def test_without_a_certificate_there_is_no_tls() -> None:
    assert server_credentials(ServerSettings()) is None


def test_tls_files_that_cannot_be_used_are_refused_at_the_start(authority: Authority, tmp_path: Path) -> None:
    chain, _ = authority.issue("server")
    _, key = authority.issue("other")
    with pytest.raises(ConfigurationError, match=f"{chain} and the key {key} cannot be used together"):
        server_credentials(ServerSettings(tls_certificate=chain, tls_key=key))
    junk = replace_file(tmp_path / "junk.pem", "junk")
    with pytest.raises(ConfigurationError, match=f"{junk} holds no certificates"):
        server_credentials(ServerSettings(**authority.tls(), tls_client_ca=junk))
