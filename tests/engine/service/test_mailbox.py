"""The queue of one stream: bounded, latest wins, the end always arrives."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from reelstep.engine.request import Event, Failed, Preview, Progress, Queued
from reelstep.engine.service.mailbox import Mailbox
from reelstep.errors import Cancelled

FRAMES = np.zeros((1, 1, 2, 2, 3), np.uint8)


async def drain(mailbox: Mailbox) -> list[Event]:
    events: list[Event] = []
    while not events or not isinstance(events[-1], Failed):
        events.append(await mailbox.get())
    return events


def test_a_slow_reader_gets_the_latest_preview_and_the_end() -> None:
    async def run() -> list[Event]:
        mailbox = Mailbox()
        for step in range(1000):
            mailbox.post(Preview(step, FRAMES))
        await asyncio.sleep(0.01)
        first = await mailbox.get()
        mailbox.post(Preview(2000, FRAMES))
        mailbox.post(Failed(Cancelled("gone")))
        await asyncio.sleep(0.01)
        return [first, *await drain(mailbox)]

    first, *rest = asyncio.run(run())
    assert isinstance(first, Preview)
    assert first.step == 999
    assert [type(e) for e in rest] == [Failed]


def test_statuses_come_at_most_ten_times_a_second_and_the_latest_is_told() -> None:
    async def run() -> list[Event]:
        mailbox = Mailbox()
        mailbox.post(Queued(0, 0.0))

        async def produce() -> None:
            for step in range(100):
                mailbox.post(Progress("denoise", step, 100, 0.0))
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.15)
            mailbox.post(Failed(Cancelled("done")))

        producer = asyncio.create_task(produce())
        events = await drain(mailbox)
        await producer
        return events

    began = time.monotonic()
    events = asyncio.run(run())
    assert isinstance(events[0], Queued)
    steps = [e.step for e in events if isinstance(e, Progress)]
    assert 3 <= len(steps) <= (time.monotonic() - began) * 10 + 1
    assert steps == sorted(steps)
    assert steps[-1] == 99


def test_an_event_after_the_loop_has_closed_is_dropped() -> None:
    async def make() -> Mailbox:
        return Mailbox()

    asyncio.run(make()).post(Queued(0, 0.0))
