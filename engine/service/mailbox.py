"""The bounded queue between an engine's thread and one client's stream."""

from __future__ import annotations

import asyncio

from reelstep.engine.request import Event, Failed, Finished, Preview, Progress, Queued

STATUS_INTERVAL_S = 0.1


class Mailbox:
    """Holds at most one status, one preview and the end, so a slow reader costs nothing: the latest wins, and the end always arrives.

    Lives on the event loop of the thread that makes it. `post` may be called from any thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._status: Queued | Progress | None = None
        self._preview: Preview | None = None
        self._end: Finished | Failed | None = None
        self._next_status_at = 0.0

    def post(self, event: Event) -> None:
        """Called by the engine. After the loop is closed nobody reads, and the event is dropped."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        if isinstance(event, Finished | Failed):
            self._end = event
        elif isinstance(event, Preview):
            self._preview = event
        else:
            self._status = event
        self._wake.set()

    async def get(self) -> Event:
        """The next thing to tell the client; statuses at most one in STATUS_INTERVAL_S."""
        while (event := self._take()) is None:
            self._wake.clear()
            wait_s = self._next_status_at - self._loop.time() if self._status else None
            try:
                await asyncio.wait_for(self._wake.wait(), wait_s)
            except TimeoutError:
                continue
        return event

    def _take(self) -> Event | None:
        if self._end is not None:
            return self._end
        if self._preview is not None:
            preview, self._preview = self._preview, None
            return preview
        if self._status is not None and self._loop.time() >= self._next_status_at:
            status, self._status = self._status, None
            self._next_status_at = self._loop.time() + STATUS_INTERVAL_S
            return status
        return None
