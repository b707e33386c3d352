"""Certificates, tokens, and servers that ask for them; what such a server answers is of no interest."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import trustme
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import geosurge.v1
from geosurge.server.failures import PrivatePaths
from geosurge.server.interceptors import CallInterceptor
from geosurge.server.metrics import Metrics
from geosurge.server.security import AuthInterceptor, Tokens, server_credentials
from geosurge.settings import ServerSettings

INDEX_VERSION = "secured"


class Authority:
    """A certificate authority that keeps what it issues in a directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.ca_file = directory / "ca.pem"
        self._ca = trustme.CA()
        self._ca.cert_pem.write_to_path(str(self.ca_file))

    def issue(self, name: str, *hosts: str) -> tuple[Path, Path]:
        """Issues a certificate, in the place of an older one of the name; returns its file and its key's."""
        issued = self._ca.issue_cert(*(hosts or ("localhost", "127.0.0.1")))
        chain, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        replace_file(chain, b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        replace_file(key, issued.private_key_pem.bytes())
        return chain, key

    def tls(self, name: str = "server", *hosts: str) -> dict[str, Path]:
        """Settings of a server with a new certificate."""
        chain, key = self.issue(name, *hosts)
        return {"tls_certificate": chain, "tls_key": key}


def replace_file(path: Path, content: bytes | str, mode: int = 0o600) -> Path:
    """Puts a file in the place of another at once, as tools that renew certificates do."""
    aside = path.with_name(f".{path.name}")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    aside.chmod(mode)
    return aside.replace(path)


def new_token() -> str:
    """A token as `openssl rand -hex 32` prints it."""
    return secrets.token_hex(32)


def services() -> list[ServiceDescriptor]:
    """Every service of the public API."""
    modules = [
        importlib.import_module(f"geosurge.v1.{module.name}")
        for module in pkgutil.iter_modules(geosurge.v1.__path__)
        if module.name.endswith("_pb2")
    ]
    return [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]


@contextmanager
def secured_server(settings: ServerSettings) -> Iterator[str]:
    """Runs a server with all services of the API on a free port, on a thread of its own; yields ``host:port``."""
    ready: Future[str] = Future()
    over = threading.Event()

    async def run() -> None:
        interceptors = [
            CallInterceptor(asyncio.Event(), Metrics(), PrivatePaths({})),
            AuthInterceptor(Tokens.from_settings(settings)),
        ]
        server = grpc.aio.server(interceptors=interceptors)
        server.add_generic_rpc_handlers([_handlers(service) for service in services()])
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        reflection.enable_server_reflection([reflection.SERVICE_NAME], server)
        credentials = server_credentials(settings)
        port = (
            server.add_insecure_port("127.0.0.1:0")
            if credentials is None
            else server.add_secure_port("127.0.0.1:0", credentials)
        )
        await server.start()
        ready.set_result(f"127.0.0.1:{port}")
        await asyncio.to_thread(over.wait)
        await server.stop(0)

    thread = threading.Thread(target=_run, args=(run, ready))
    thread.start()
    try:
        yield ready.result(30)
    finally:
        over.set()
        thread.join()


def _run(main: Any, ready: Future[str]) -> None:
    try:
        asyncio.run(main())
    except Exception as error:
        if ready.done():
            raise
        ready.set_exception(error)


def _handlers(service: ServiceDescriptor) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(
        service.full_name, {method.name: _handler(method) for method in service.methods}
    )


def _handler(method: MethodDescriptor) -> Any:
    codecs = {
        "request_deserializer": message_factory.GetMessageClass(method.input_type).FromString,
        "response_serializer": message_factory.GetMessageClass(method.output_type).SerializeToString,
    }
    response = message_factory.GetMessageClass(method.output_type)()
    if "index_version" in method.output_type.fields_by_name:
        response.index_version = INDEX_VERSION  # type: ignore[attr-defined]

    async def answer(_request: Any, _context: Any) -> Any:
        return response

    async def answer_stream(requests: AsyncIterator[Any], context: Any) -> None:
        async for message in requests:
            response.ClearField("results")
            for request in message.requests:
                response.results.add(request_id=request.request_id).response.index_version = INDEX_VERSION
            await context.write(response)

    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(answer_stream, **codecs)
    return grpc.unary_unary_rpc_method_handler(answer, **codecs)
