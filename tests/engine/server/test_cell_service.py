from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.bad_requests import INVALID, NOT_FOUND
from support.refusals import refused
from support.servers import running, settings_for

from geosurge.cells import CellTree
from geosurge.server.app import Server
from geosurge.v1 import cell_pb2, cell_pb2_grpc

Live = tuple[Server, grpc.aio.Channel]


def cells(channel: grpc.aio.Channel) -> Any:
    return cell_pb2_grpc.CellServiceStub(channel)


async def test_a_cell_is_found_by_its_token_and_level(live: Live, bundle: Path) -> None:
    stub = cells(live[1])
    with CellTree.open(bundle / "cells.lmdb") as tree:
        for level in (1, 2, 3):
            cell = tree.cell(level, 0)
            response = await stub.GetCell(cell_pb2.GetCellRequest(token=cell.token, level=level))
            assert response == cell_pb2.GetCellResponse(cell=cell, index_version="tiny")
    async with refused(NOT_FOUND, "CELL_UNKNOWN"):
        await stub.GetCell(cell_pb2.GetCellRequest(token="zz"))
    async with refused(NOT_FOUND, "CELL_UNKNOWN"):
        await stub.GetCell(cell_pb2.GetCellRequest())
    async with refused(NOT_FOUND, "INDEX_VERSION_UNKNOWN"):
        await stub.GetCell(cell_pb2.GetCellRequest(token=cell.token, index_version="nope"))
    for level in (0, 4, 2**32 - 1):
        async with refused(INVALID, "LEVEL_OUT_OF_RANGE"):
            await stub.GetCell(cell_pb2.GetCellRequest(token=cell.token, level=level))


async def test_listing_children_page_by_page_walks_the_whole_tree(live: Live, bundle: Path) -> None:
    stub = cells(live[1])

    async def children(token: str, level: int | None, page_size: int) -> list[cell_pb2.Cell]:
        request = cell_pb2.ListChildrenRequest(token=token, level=level, page_size=page_size)
        listed: list[cell_pb2.Cell] = []
        while True:
            response = await stub.ListChildren(request)
            assert len(response.cells) <= page_size
            listed += response.cells
            if not response.next_page_token:
                return listed
            request.page_token = response.next_page_token

    with CellTree.open(bundle / "cells.lmdb") as tree:
        expected = [[tree.cell(level, row) for row in range(tree.cell_counts[level - 1])] for level in (1, 2, 3)]
    assert await children("", None, 3) == expected[0]
    second = [cell for parent in expected[0] for cell in await children(parent.token, 1, 1)]
    assert second == expected[1]
    third = [cell for parent in second for cell in await children(parent.token, 2, 2)]
    assert third == expected[2]
    assert await children(third[0].token, 3, 5) == []
    # Without a level the finest one counts, so that a cell that was not split is a leaf here.
    assert await children(third[0].token, None, 5) == []


@pytest.mark.parametrize("token", ["x", "AAAA", "WzFd", "bnVsbA==", "é", "W10="])
async def test_a_page_token_of_ones_own_making_is_refused(live: Live, token: str) -> None:
    async with refused(INVALID, "PAGE_INVALID"):
        await cells(live[1]).ListChildren(cell_pb2.ListChildrenRequest(page_token=token))


async def test_a_page_token_of_any_length_is_refused_unread(live: Live) -> None:
    stub = cells(live[1])
    first = await stub.ListChildren(cell_pb2.ListChildrenRequest(page_size=1))
    # The token that was issued, with spaces that JSON allows.
    padded = base64.urlsafe_b64encode(b" " * 3072 + base64.urlsafe_b64decode(first.next_page_token)).decode()
    for token in (padded, base64.urlsafe_b64encode(b"[" + b"{}," * 100_000 + b"1]").decode()):
        async with refused(INVALID, "PAGE_INVALID"):
            await stub.ListChildren(cell_pb2.ListChildrenRequest(page_size=1, page_token=token))


async def test_a_name_that_no_version_can_have_is_refused(live: Live) -> None:
    name = "x" * 256
    coordinate = cell_pb2.Coordinate()
    for call in (
        cells(live[1]).ListChildren(cell_pb2.ListChildrenRequest(index_version=name)),
        cells(live[1]).GetCell(cell_pb2.GetCellRequest(token="1", index_version=name)),
        cells(live[1]).GetPath(cell_pb2.GetPathRequest(coordinate=coordinate, index_version=name)),
    ):
        async with refused(INVALID, "OPTION_OUT_OF_RANGE"):
            await call


async def test_a_page_token_belongs_to_its_listing(live: Live) -> None:
    stub = cells(live[1])
    first = await stub.ListChildren(cell_pb2.ListChildrenRequest(page_size=1))
    other = cell_pb2.ListChildrenRequest(token=first.cells[0].token, page_token=first.next_page_token)
    async with refused(INVALID, "PAGE_INVALID"):
        await stub.ListChildren(other)
    elsewhere = cell_pb2.ListChildrenRequest(index_version="nope", page_token=first.next_page_token)
    async with refused(INVALID, "PAGE_INVALID"):
        await stub.ListChildren(elsewhere)


async def test_a_path_leads_to_the_cells_around_a_coordinate(live: Live, bundle: Path) -> None:
    stub = cells(live[1])
    with CellTree.open(bundle / "cells.lmdb") as tree:
        leaf = tree.cell(3, 7)
        response = await stub.GetPath(cell_pb2.GetPathRequest(coordinate=leaf.mean))
        expected = tree.path(leaf.mean.latitude_deg, leaf.mean.longitude_deg)
    assert list(response.cells) == expected
    assert response.cells[-1].token == leaf.token
    for latitude_deg in (91.0, float("nan")):
        async with refused(INVALID, "COORDINATE_OUT_OF_RANGE"):
            await stub.GetPath(cell_pb2.GetPathRequest(coordinate=cell_pb2.Coordinate(latitude_deg=latitude_deg)))
    async with refused(INVALID, "COORDINATE_OUT_OF_RANGE"):
        await stub.GetPath(cell_pb2.GetPathRequest())


async def test_reading_cells_takes_a_permit_and_gives_it_back(bundle: Path) -> None:
    async with running(settings_for(bundle, max_concurrent_requests=1)) as (server, channel):
        stub = cells(channel)
        coordinate = cell_pb2.Coordinate(latitude_deg=10.0, longitude_deg=20.0)
        with server._admission.take():
            async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"):
                await stub.ListChildren(cell_pb2.ListChildrenRequest())
            async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"):
                await stub.GetCell(cell_pb2.GetCellRequest(token="1"))
            async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"):
                await stub.GetPath(cell_pb2.GetPathRequest(coordinate=coordinate))
        assert (await stub.ListChildren(cell_pb2.ListChildrenRequest())).cells
        async with refused(NOT_FOUND, "CELL_UNKNOWN"):
            await stub.GetCell(cell_pb2.GetCellRequest(token="zz"))
        assert server._admission.in_use == 0
