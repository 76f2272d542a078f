"""Threads that copy: order, giving way, giving up, errors."""

import threading

import pytest

from moestro.offload.cache import SlotCache
from moestro.offload.files import OffloadError
from moestro.offload.loader import Loader
from moestro.offload.policies import SINGLE, Key, Records
from moestro.offload.replay import Sizes
from moestro.offload.scorer import Precision
from moestro.offload.threads import ThreadTransport
from moestro.offload.trace import Header
from moestro.offload.transport import AHEAD, DEMAND, Job


def job(name: int, blocks: list) -> Job:
    return Job((0, name), Precision.HIGH, 10, blocks)


@pytest.fixture
def one_thread():
    transport = ThreadTransport(1)
    yield transport
    transport.close()


def test_demand_goes_between_two_blocks_of_a_fetch(one_thread: ThreadTransport) -> None:
    order, started, go = [], threading.Event(), threading.Event()

    def first() -> None:
        started.set()
        go.wait(10)
        order.append("a1")

    slow = one_thread.submit(job(0, [first, lambda: order.append("a2")]), AHEAD)
    assert started.wait(10)
    later = one_thread.submit(job(1, [lambda: order.append("b")]), AHEAD)
    quick = one_thread.submit(job(2, [lambda: order.append("c1"), lambda: order.append("c2")]), DEMAND)
    assert not one_thread.arrived(quick)
    go.set()
    for ticket in (quick, slow, later):
        one_thread.wait(ticket)
    assert order == ["a1", "c1", "c2", "a2", "b"] and one_thread.moved == 30


def test_a_promoted_fetch_overtakes(one_thread: ThreadTransport) -> None:
    order, go = [], threading.Event()
    gate = one_thread.submit(job(0, [lambda: go.wait(10)]), DEMAND)
    tickets = [one_thread.submit(job(i, [lambda i=i: order.append(i)]), AHEAD) for i in (1, 2)]
    one_thread.promote(tickets[1])
    go.set()
    for ticket in (gate, *tickets):
        one_thread.wait(ticket)
    assert order == [2, 1]


def test_giving_up_waits_for_the_block_that_runs(one_thread: ThreadTransport) -> None:
    done, started, go = [], threading.Event(), threading.Event()

    def first() -> None:
        started.set()
        go.wait(10)
        done.append(1)

    ticket = one_thread.submit(job(0, [first, lambda: done.append(2)]), AHEAD)
    assert started.wait(10)
    threading.Timer(0.05, go.set).start()
    one_thread.cancel(ticket)
    # its memory is free now: nothing of it runs, and nothing will
    assert done == [1]
    one_thread.wait(one_thread.submit(job(1, []), DEMAND))
    assert done == [1] and ticket.cancelled and not one_thread.arrived(ticket)
    with pytest.raises(OffloadError, match="given up"):
        one_thread.wait(ticket)


def test_errors_reach_whoever_waits(one_thread: ThreadTransport) -> None:
    def fails() -> None:
        raise OffloadError("the disk is gone")

    ticket = one_thread.submit(job(0, [fails, lambda: None]), DEMAND)
    with pytest.raises(OffloadError, match="the disk is gone"):
        one_thread.wait(ticket)
    assert not one_thread.arrived(ticket) and one_thread.moved == 0
    # the thread goes on
    one_thread.wait(one_thread.submit(job(1, [lambda: None]), DEMAND))


def test_closing_ends_what_waits() -> None:
    transport, go = ThreadTransport(1), threading.Event()
    transport.submit(job(0, [lambda: go.wait(10)]), DEMAND)
    waiting = transport.submit(job(1, [lambda: None]), DEMAND)
    threading.Timer(0.05, go.set).start()
    transport.close()
    with pytest.raises(OffloadError, match="given up"):
        transport.wait(waiting)
    with pytest.raises(OffloadError, match="closed"):
        transport.submit(job(2, []), DEMAND)
    with pytest.raises(ValueError, match="workers=0"):
        ThreadTransport(0)


def test_blocks_that_need_no_order_run_at_once() -> None:
    transport, together, order = ThreadTransport(2), threading.Barrier(2, timeout=10), []
    # each waits for the other: one thread alone would never end them
    free = Job((0, 0), Precision.HIGH, 10, [together.wait, together.wait, together.wait, together.wait], ordered=False)
    transport.wait(transport.submit(free, DEMAND))
    assert transport.moved == 10
    steps = [lambda i=i: order.append(i) for i in range(50)]
    transport.wait(transport.submit(job(1, steps), DEMAND))
    assert order == list(range(50)) and transport.moved == 20
    transport.close()


def test_a_block_that_fails_ends_the_others_of_its_job() -> None:
    transport, go, begun, later = ThreadTransport(2), threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        go.wait(10)
        later.append("slow")

    def fails() -> None:
        begun.wait(10)
        raise OffloadError("the disk is gone")

    blocks = [slow, fails, lambda: later.append("never")]
    ticket = transport.submit(Job((0, 0), Precision.HIGH, 10, blocks, ordered=False), DEMAND)
    with pytest.raises(OffloadError, match="the disk is gone"):
        transport.wait(ticket)
    assert not later
    threading.Timer(0.05, go.set).start()
    # its memory is used again only once nothing writes there
    transport.cancel(ticket)
    assert later == ["slow"] and transport.moved == 0 and not transport.arrived(ticket)
    transport.wait(transport.submit(job(1, [lambda: None]), DEMAND))
    transport.close()


def test_scratch_is_free_once_a_copy_that_failed_has_ended() -> None:
    transport, begun, go, done = ThreadTransport(2), threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        go.wait(10)
        done.append("slow")

    def fails() -> None:
        begun.wait(10)
        raise OffloadError("the disk is gone")

    class NoSlots(Sizes):
        def take(self, key: Key, precision: Precision, scratch: bool = False) -> Job:
            assert scratch
            return Job(key, precision, 8, [slow, fails], ordered=False)

    header = Header("", [[8]], [[2]], 1)
    cache = SlotCache({Precision.HIGH: 0}, SINGLE["lru"], 1, Records())
    threading.Timer(0.05, go.set).start()
    with pytest.raises(OffloadError, match="the disk is gone"):
        list(Loader(cache, NoSlots(header), transport).serve(0, {0: Precision.HIGH}))
    assert done == ["slow"]
    transport.close()


def test_a_job_without_order_is_given_up_between_its_blocks() -> None:
    transport, go, begun, done = ThreadTransport(2), threading.Event(), threading.Barrier(3, timeout=10), []

    def block() -> None:
        begun.wait()
        go.wait(10)
        done.append(1)

    ticket = transport.submit(Job((0, 0), Precision.HIGH, 10, [block] * 9, ordered=False), AHEAD)
    begun.wait()
    threading.Timer(0.05, go.set).start()
    transport.cancel(ticket)
    assert len(done) == 2 and ticket.cancelled and not ticket.done and transport.moved == 0
    transport.close()
