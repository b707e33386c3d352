from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geosurge.errors import OverloadedError, PeerOverloadedError
from geosurge.server.admission import Admission


async def test_permits_are_refused_beyond_their_number_and_come_back() -> None:
    admission = Admission(2)
    with admission.take(), admission.take():
        with pytest.raises(OverloadedError) as refusal:
            admission.take()
        assert 0 < refusal.value.retry_after_seconds <= 5
    assert admission.in_use == 0
    admission.take().release()


async def test_releasing_twice_gives_one_permit_back() -> None:
    admission = Admission(2)
    first, _second = admission.take(), admission.take()
    first.release()
    first.release()
    assert admission.in_use == 1


async def test_waiting_streams_leave_permits_to_unary_calls_and_get_back_what_those_have_taken_of_theirs() -> None:
    admission = Admission(8)
    assert admission.permits_for_streams == 6
    streams = [await admission.wait() for _ in range(6)]
    waiting = [asyncio.create_task(admission.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    unary = [admission.take() for _ in range(2)]
    with pytest.raises(OverloadedError):
        admission.take()
    unary.pop().release()
    unary.append(admission.take())
    streams.pop().release()
    streams.append(await waiting[0])
    assert not waiting[1].done()
    for permit in streams:
        permit.release()
    streams = [await task for task in waiting[1:]]
    unary += [admission.take() for _ in range(4)]
    late = asyncio.create_task(admission.wait())
    await asyncio.sleep(0)
    unary.pop().release()
    streams.append(await late)
    for permit in [*unary, *streams]:
        permit.release()
    assert admission.in_use == 0


@pytest.mark.parametrize(("permits", "for_streams"), [(1, 1), (2, 1), (3, 2), (4, 3), (64, 48)])
def test_streams_may_hold_three_quarters_of_the_permits_and_at_least_one(permits: int, for_streams: int) -> None:
    assert Admission(permits).permits_for_streams == for_streams


async def test_waiters_are_served_in_order_and_before_those_who_do_not_wait() -> None:
    admission = Admission(1)
    held = admission.take()
    served: list[int] = []

    async def wait(number: int) -> None:
        with await admission.wait():
            served.append(number)
            with pytest.raises(OverloadedError):
                admission.take()

    tasks = [asyncio.create_task(wait(number)) for number in range(3)]
    await asyncio.sleep(0)
    held.release()
    await asyncio.gather(*tasks)
    assert served == [0, 1, 2]
    assert admission.in_use == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), max_size=30), st.integers(1, 5))
def test_no_permit_is_lost_whoever_is_cancelled_whenever(callers: list[tuple[bool, bool, int]], permits: int) -> None:
    async def run() -> None:
        admission = Admission(permits)
        held_by_streams = 0

        async def call(steps: int, *, of_stream: bool) -> None:
            nonlocal held_by_streams
            with await admission.wait() if of_stream else admission.take():
                held_by_streams += of_stream
                assert admission.in_use <= permits
                assert held_by_streams <= admission.permits_for_streams
                try:
                    for _ in range(steps):
                        await asyncio.sleep(0)
                finally:
                    held_by_streams -= of_stream

        tasks = []
        for of_stream, cancelled, steps in callers:
            task = asyncio.create_task(call(steps, of_stream=of_stream))
            tasks.append(task)
            for _ in range(steps):
                await asyncio.sleep(0)
            if cancelled:
                task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} <= {type(None), OverloadedError, asyncio.CancelledError}
        assert admission.in_use == 0
        for _ in range(admission.permits_for_streams):
            await asyncio.wait_for(admission.wait(), 1)

    asyncio.run(run())


async def test_a_permit_handed_to_a_waiter_that_is_cancelled_goes_to_the_next() -> None:
    admission = Admission(1)
    held = admission.take()
    first = asyncio.create_task(admission.wait())
    second = asyncio.create_task(admission.wait())
    await asyncio.sleep(0)
    held.release()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    (await second).release()
    assert admission.in_use == 0


async def test_a_peer_that_has_all_it_may_have_is_refused_while_others_are_served() -> None:
    admission = Admission(3, permits_per_peer=2)
    first, _second = admission.take("a"), admission.take("a")
    with pytest.raises(PeerOverloadedError, match="2 requests from this address") as refusal:
        admission.take("a")
    assert 0 < refusal.value.retry_after_seconds <= 5
    other = admission.take("b")
    with pytest.raises(OverloadedError) as full:
        admission.take("c")
    assert not isinstance(full.value, PeerOverloadedError)
    other.release()
    first.release()
    admission.take("a").release()


async def test_a_waiting_peer_that_may_have_no_more_is_passed_over_and_not_forgotten() -> None:
    admission = Admission(3, permits_per_peer=1)
    held = [admission.take(peer) for peer in ("a", "b", "c")]
    waiting = {name: asyncio.create_task(admission.wait(name[0])) for name in ("a1", "a2", "b1")}
    await asyncio.sleep(0)
    held[1].release()
    (await waiting["b1"]).release()
    assert not waiting["a1"].done()
    held[0].release()
    (await waiting["a1"]).release()
    (await waiting["a2"]).release()
    held[2].release()
    assert admission.in_use == 0
