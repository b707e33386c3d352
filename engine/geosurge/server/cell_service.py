"""The service that reads cells. Every call takes one version handle and answers from it alone."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

from geosurge.cells import CellTree
from geosurge.errors import (
    CoordinateOutOfRangeError,
    PageInvalidError,
)
from geosurge.server.admission import Admission, peer_address
from geosurge.server.batcher import Batcher
from geosurge.server.conversions import (
    check_version_name,
)
from geosurge.server.handle import VersionHandle
from geosurge.server.interceptors import current_call
from geosurge.server.versions import Versions
from geosurge.settings import ServerSettings
from geosurge.v1 import cell_pb2, cell_pb2_grpc

_MAX_PAGE_TOKEN_LENGTH: Final = 4096
"""More than any that the server issues: a version's name, a cell's token and two numbers."""

_Result = TypeVar("_Result")


class CellService(cell_pb2_grpc.CellServiceServicer):
    """Reads the cells of an index version. Look-ups touch the disk, so they run on threads of their own.

    A call takes a permit, or is refused at once, as one that locates does: both compete for the same machine.
    """

    def __init__(self, settings: ServerSettings, versions: Versions, batcher: Batcher, admission: Admission) -> None:
        self._settings = settings
        self._versions = versions
        self._batcher = batcher
        self._admission = admission

    async def GetCell(  # noqa: N802
        self,
        request: cell_pb2.GetCellRequest,
        context: Any,  # noqa: ANN401
    ) -> cell_pb2.GetCellResponse:
        """Returns one cell by its token."""
        level = request.level if request.HasField("level") else None
        find = partial(CellTree.find, token=request.token, level=level)
        cell, version = await self._read(context, request.index_version, find)
        return cell_pb2.GetCellResponse(cell=cell, index_version=version)

    async def ListChildren(  # noqa: N802
        self,
        request: cell_pb2.ListChildrenRequest,
        context: Any,  # noqa: ANN401
    ) -> cell_pb2.ListChildrenResponse:
        """Returns a page of the children of a cell, or of the cells of level 1."""
        level = request.level if request.HasField("level") else None
        size = min(request.page_size or self._settings.max_page_size, self._settings.max_page_size)
        start, version = _read_page_token(request)

        def read(tree: CellTree) -> tuple[list[cell_pb2.Cell], bool]:
            child_level, children = _children(tree, request.token, level)
            if not 0 <= start <= len(children):
                raise _page_error()
            page = children[start : start + size]
            return [tree.cell(child_level, ordinal) for ordinal in page], start + size < len(children)

        (cells, more), version = await self._read(context, version, read)
        token = _write_page_token(request, start + size, version) if more else ""
        return cell_pb2.ListChildrenResponse(cells=cells, index_version=version, next_page_token=token)

    async def GetPath(  # noqa: N802
        self,
        request: cell_pb2.GetPathRequest,
        context: Any,  # noqa: ANN401
    ) -> cell_pb2.GetPathResponse:
        """Returns the cells that hold a coordinate."""
        if not request.HasField("coordinate"):
            raise CoordinateOutOfRangeError("the request has no coordinate; set latitude_deg and longitude_deg")
        latitude_deg, longitude_deg = request.coordinate.latitude_deg, request.coordinate.longitude_deg
        path = partial(CellTree.path, latitude_deg=latitude_deg, longitude_deg=longitude_deg)
        cells, version = await self._read(context, request.index_version, path)
        return cell_pb2.GetPathResponse(cells=cells, index_version=version)

    async def _read(
        self,
        context: Any,  # noqa: ANN401
        version: str,
        look_up: Callable[[CellTree], _Result],
    ) -> tuple[_Result, str]:
        name = check_version_name(version)
        with self._admission.take(peer_address(context)), self._versions.acquire(name) as handle:
            current_call().index_version = handle.name
            return await self._batcher.in_reader(_look_up, handle, look_up), handle.name


def _look_up(handle: VersionHandle, look_up: Callable[[CellTree], _Result]) -> _Result:
    with handle.use() as locator:
        return look_up(locator.tree)


def _children(tree: CellTree, token: str, level: int | None) -> tuple[int, range]:
    """Level and ordinals of the children of a cell; without a token, of the whole globe."""
    if not token:
        return 1, range(tree.cell_counts[0])
    parent = tree.find(token, level, finest=True)
    return parent.level + 1, tree.children(parent.level, parent.ordinal)


def _write_page_token(request: cell_pb2.ListChildrenRequest, start: int, version: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([version, *_listing(request), start]).encode()).decode()


def _read_page_token(request: cell_pb2.ListChildrenRequest) -> tuple[int, str]:
    """Where a page starts, and the version it is read from: that of the first page, so that pages fit together."""
    if not request.page_token:
        return 0, request.index_version
    if len(request.page_token) > _MAX_PAGE_TOKEN_LENGTH:
        raise _page_error()
    try:
        version, *listing, start = json.loads(base64.b64decode(request.page_token, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise _page_error() from error
    fits = listing == _listing(request) and request.index_version in ("", version)
    if not (fits and isinstance(version, str) and type(start) is int):
        raise _page_error()
    return start, version


def _listing(request: cell_pb2.ListChildrenRequest) -> list[Any]:
    return [request.token, request.level if request.HasField("level") else None]


def _page_error() -> PageInvalidError:
    return PageInvalidError(
        "page_token was not issued for this cell, level and index version; repeat the request that issued it with "
        "the token added, or start again without one"
    )
