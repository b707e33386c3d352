"""The service that loads, activates and unloads index versions, for administrators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from geosurge.description import IndexVersion, VersionState
from geosurge.errors import OptionOutOfRangeError
from geosurge.server.conversions import check_version_name
from geosurge.server.interceptors import current_call
from geosurge.server.versions import Versions
from geosurge.v1 import index_pb2, index_pb2_grpc
from geosurge.wire import version_to_message


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
        versions = await self._versions.statuses()
        active = [version.name for version in versions if version.state is VersionState.ACTIVE]
        return index_pb2.ListVersionsResponse(
            versions=[_message(version) for version in versions], active_version=active[0] if active else ""
        )

    async def GetVersion(  # noqa: N802
        self,
        request: index_pb2.GetVersionRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.GetVersionResponse:
        """Returns one version."""
        return index_pb2.GetVersionResponse(version=_message(self._versions.status(_name(request.name))))

    async def LoadVersion(  # noqa: N802
        self,
        request: index_pb2.LoadVersionRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.LoadVersionResponse:
        """Starts to load a version."""
        return index_pb2.LoadVersionResponse(version=_message(self._versions.load(_name(request.name))))

    async def ActivateVersion(  # noqa: N802
        self,
        request: index_pb2.ActivateVersionRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.ActivateVersionResponse:
        """Makes a version the active one; returns when it is."""
        before = await self._versions.activate(_name(request.name), unload_first=request.unload_first)
        status = self._versions.status(request.name)
        return index_pb2.ActivateVersionResponse(version=_message(status), previous_version=before)

    async def RollbackVersion(  # noqa: N802
        self,
        request: index_pb2.RollbackVersionRequest,  # noqa: ARG002
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.RollbackVersionResponse:
        """Activates the version that was active before."""
        name, before = await self._versions.rollback()
        current_call().index_version = name
        return index_pb2.RollbackVersionResponse(version=_message(self._versions.status(name)), previous_version=before)

    async def UnloadVersion(  # noqa: N802
        self,
        request: index_pb2.UnloadVersionRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.UnloadVersionResponse:
        """Frees a version."""
        return index_pb2.UnloadVersionResponse(version=_message(self._versions.unload(_name(request.name))))

    async def SetCanary(  # noqa: N802
        self,
        request: index_pb2.SetCanaryRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> index_pb2.SetCanaryResponse:
        """Starts, changes or ends a canary."""
        name = _name(request.name) if request.name else ""
        status = self._versions.set_canary(name, request.share)
        return index_pb2.SetCanaryResponse(version=None if status is None else _message(status))


def _message(version: IndexVersion) -> index_pb2.IndexVersion:
    failure = version.failure
    if failure is not None:
        version = replace(version, failure=current_call().private_paths.hide(failure))
    return version_to_message(version)


def _name(name: str) -> str:
    if not name:
        raise OptionOutOfRangeError("the request names no version; set name")
    current_call().index_version = check_version_name(name)
    return name
