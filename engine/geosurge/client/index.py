"""The client of administrators: which index versions a server has loaded, and which one is active."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final, Self

from geosurge.client.attempts import RetryPolicy
from geosurge.client.blocking import Client
from geosurge.client.connection import Connection
from geosurge.description import IndexVersion
from geosurge.v1 import index_pb2, index_pb2_grpc
from geosurge.wire import message_to_version

LOAD_TIMEOUT_SECONDS: Final = 600.0
"""Time that reading and checking a large bundle may take."""


class IndexClient:
    """A blocking client of the IndexService; safe to use from many threads at once."""

    def __init__(
        self, address: str, *, timeout_seconds: float = LOAD_TIMEOUT_SECONDS, connection: Connection | None = None
    ) -> None:
        """Prepares a connection, which is made by the first call.

        Args:
            address: ``host:port`` of the IndexService.
            timeout_seconds: Time that a call may take; activating a version includes loading it.
            connection: Encryption and credentials; ``None`` is plain text without a token.
        """
        # A call that changes a server is never repeated unasked.
        self._client = Client(
            address, timeout_seconds=timeout_seconds, retry=RetryPolicy(max_attempts=1), connection=connection
        )
        self._index: Any = index_pb2_grpc.IndexServiceStub(self._client.channel)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def versions(self) -> list[IndexVersion]:
        """Every bundle of the server's store and every version that was ever asked for, by name."""
        response = self._client.call(self._index.ListVersions, index_pb2.ListVersionsRequest())
        return [message_to_version(version) for version in response.versions]

    def version(self, name: str) -> IndexVersion:
        """One version.

        Raises:
            BundleNotFoundError: The server does not have it.
        """
        response = self._client.call(self._index.GetVersion, index_pb2.GetVersionRequest(name=name))
        return message_to_version(response.version)

    def load(self, name: str) -> IndexVersion:
        """Starts to load a version; `version` reports its progress.

        Raises:
            BundleNotFoundError: The server does not have it.
        """
        response = self._client.call(self._index.LoadVersion, index_pb2.LoadVersionRequest(name=name))
        return message_to_version(response.version)

    def activate(self, name: str, *, unload_first: bool = False) -> IndexVersion:
        """Makes a version the active one, after loading it; returns when it is.

        Args:
            name: The version.
            unload_first: Where memory does not suffice for both, refuse traffic in between.

        Raises:
            BundleError: It cannot be used; the server goes on with the one it has.
            VersionError: It does not fit, or a newer request wants another one.
        """
        request = index_pb2.ActivateVersionRequest(name=name, unload_first=unload_first)
        return message_to_version(self._client.call(self._index.ActivateVersion, request).version)

    def rollback(self) -> IndexVersion:
        """Activates the version that was active before.

        Raises:
            StoreError: There is none.
        """
        response = self._client.call(self._index.RollbackVersion, index_pb2.RollbackVersionRequest())
        return message_to_version(response.version)

    def unload(self, name: str) -> IndexVersion:
        """Frees a version once its requests are answered.

        Raises:
            VersionInUseError: It is the active version or the canary.
        """
        response = self._client.call(self._index.UnloadVersion, index_pb2.UnloadVersionRequest(name=name))
        return message_to_version(response.version)

    def set_canary(self, name: str, share: float) -> IndexVersion | None:
        """Sends a share of the requests that name no version to a second one; an empty name ends it.

        Raises:
            VersionNotLoadedError: It is not loaded.
            VersionInUseError: It is the active version.
        """
        request = index_pb2.SetCanaryRequest(name=name, share=share)
        response = self._client.call(self._index.SetCanary, request)
        return message_to_version(response.version) if response.HasField("version") else None
