"""Many small questions asked as one."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Batcher(Generic[Q, A]):
    """Collects what is asked within a few milliseconds, and asks it in one call.

    What `serve.batch` does inside a deployment, on the side of the one who calls it: a call to another replica costs
    milliseconds, and here up to a batch of questions share one. A future and at most one timer a batch is all it takes.

    Args:
        ask: answers questions in their order.
        seconds: how long the first of a batch waits for others.
        largest: questions in one batch.
    """

    def __init__(self, ask: Callable[[list[Q]], Awaitable[list[A]]], *, seconds: float, largest: int) -> None:
        self._ask, self._seconds, self._largest = ask, seconds, largest
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, question: Q) -> A:
        """The answer to one question; raises what the call that held it raised."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[A] = loop.create_future()
        self._waiting.append((question, answer))
        if len(self._waiting) >= self._largest:
            self._send()
        elif self._timer is None:
            self._timer = loop.call_later(self._seconds, self._send)
        return await answer

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._waiting = self._waiting, []
        task = asyncio.get_running_loop().create_task(self._answer(batch))
        # The loop itself holds tasks weakly.
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, batch: list[tuple[Q, "asyncio.Future[A]"]]) -> None:
        try:
            answers = await self._ask([question for question, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():  # Whoever asked may have gone.
                future.set_result(answer)
