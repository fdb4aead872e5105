"""Requests of many clients become batches: one thread runs the student, requests wait in line.

While the student works the next requests gather, so batches grow with the load and a single client waits for no one
but `max_wait_ms`. A request that fails does not fail those beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Hands items to a function in batches.

    Args:
        work: items -> results in the same order; runs in one thread.
        max_batch: items at once.
        max_wait_ms: milliseconds that the first of a batch waits for others.
        on_batch: is told the size of each batch.
    """

    def __init__(
        self,
        work: Callable[[Sequence[T]], Sequence[R]],
        *,
        max_batch: int,
        max_wait_ms: float,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._work, self._max_batch, self._wait_s, self._on_batch = work, max_batch, max_wait_ms / 1000, on_batch
        self._line: asyncio.Queue[tuple[T, asyncio.Future[R]]] = asyncio.Queue()

    async def submit(self, item: T) -> R:
        """The result of one item; raises what `work` raised for it."""
        result: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._line.put_nowait((item, result))
        return await result

    async def run(self) -> None:
        """Works until it is cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="student") as thread:
            while True:
                batch = [one for one in await self._gather() if not one[1].done()]  # some have given up waiting
                if not batch:
                    continue
                self._on_batch(len(batch))
                answers = await loop.run_in_executor(thread, self._answers, [item for item, _ in batch])
                for (_, result), answer in zip(batch, answers, strict=True):
                    if result.done():
                        continue
                    if isinstance(answer, Exception):
                        result.set_exception(answer)
                    else:
                        result.set_result(answer)

    async def _gather(self) -> list[tuple[T, asyncio.Future[R]]]:
        batch = [await self._line.get()]
        if self._line.qsize() + 1 < self._max_batch:
            await asyncio.sleep(self._wait_s)
        while len(batch) < self._max_batch and not self._line.empty():
            batch.append(self._line.get_nowait())
        return batch

    def _answers(self, items: Sequence[T]) -> Sequence[R | Exception]:
        """Results; of a batch that fails each item is tried alone."""
        try:
            return self._work(items)
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [answer for item in items for answer in self._answers([item])]
