"""The service that loads, activates and unloads index versions, for administrators."""

from __future__ import annotations

from typing import Any

from geosurge.errors import OptionOutOfRangeError
from geosurge.server.conversions import check_version_name
from geosurge.server.interceptors import current_call
from geosurge.server.policy import VersionState
from geosurge.server.versions import Versions, VersionStatus
from geosurge.v1 import index_pb2, index_pb2_grpc
from geosurge.wire import error_to_status


class IndexService(index_pb2_grpc.IndexServiceServicer):
    """Changes which versions are loaded and which one is active.

    It needs no permit, so that an overloaded server can still be administered.
    """

    def __init__(self, versions: Versions) -> None:
        self._versions = versions

    async def ListVersions(  # noqa: N802
        self,
        request: index_pb2.ListVersionsRequest,  # noqa: ARG002
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.ListVersionsResponse:
        """Lists the versions and their states."""
        statuses = await self._versions.statuses()
        active = [status.name for status in statuses if status.state is VersionState.ACTIVE]
        return index_pb2.ListVersionsResponse(
            versions=[status_message(status) for status in statuses], active_version=active[0] if active else ""
        )

    async def GetVersion(  # noqa: N802
        self,
        request: index_pb2.GetVersionRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.GetVersionResponse:
        """Returns one version."""
        return index_pb2.GetVersionResponse(version=status_message(self._versions.status(_name(request.name))))

    async def LoadVersion(  # noqa: N802
        self,
        request: index_pb2.LoadVersionRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.LoadVersionResponse:
        """Starts to load a version."""
        return index_pb2.LoadVersionResponse(version=status_message(self._versions.load(_name(request.name))))

    async def ActivateVersion(  # noqa: N802
        self,
        request: index_pb2.ActivateVersionRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.ActivateVersionResponse:
        """Makes a version the active one; returns when it is."""
        before = await self._versions.activate(_name(request.name), unload_first=request.unload_first)
        status = self._versions.status(request.name)
        return index_pb2.ActivateVersionResponse(version=status_message(status), previous_version=before)

    async def RollbackVersion(  # noqa: N802
        self,
        request: index_pb2.RollbackVersionRequest,  # noqa: ARG002
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.RollbackVersionResponse:
        """Activates the version that was active before."""
        name, before = await self._versions.rollback()
        current_call().index_version = name
        return index_pb2.RollbackVersionResponse(
            version=status_message(self._versions.status(name)), previous_version=before
        )

    async def UnloadVersion(  # noqa: N802
        self,
        request: index_pb2.UnloadVersionRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.UnloadVersionResponse:
        """Frees a version."""
        return index_pb2.UnloadVersionResponse(version=status_message(self._versions.unload(_name(request.name))))

    async def SetCanary(  # noqa: N802
        self,
        request: index_pb2.SetCanaryRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.SetCanaryResponse:
        """Starts, changes or ends a canary."""
        name = _name(request.name) if request.name else ""
        status = self._versions.set_canary(name, request.share)
        return index_pb2.SetCanaryResponse(version=None if status is None else status_message(status))


def status_message(status: VersionStatus) -> index_pb2.IndexVersion:
    """What is known of a version, as the API says it."""
    message = index_pb2.IndexVersion(
        name=status.name,
        state=f"VERSION_STATE_{status.state.name}",
        failure=None if status.failure is None else error_to_status(status.failure),
        load_step=status.load_step,
        load_progress=status.load_progress,
        request_count=status.request_count,
        memory_bytes=status.memory_bytes,
        canary_share=status.canary_share,
        encoder_sha256=status.encoder_sha256,
    )
    if status.state_time is not None:
        message.state_time.FromDatetime(status.state_time)
    if status.create_time is not None:
        message.create_time.FromDatetime(status.create_time)
    return message


def _name(name: str) -> str:
    if not name:
        raise OptionOutOfRangeError("the request names no version; set name")
    current_call().index_version = check_version_name(name)
    return name
