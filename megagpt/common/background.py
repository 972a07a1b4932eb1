"""Work in daemon threads of low priority, so that it delays neither exit nor training.

Standard library only.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from megagpt.utils import RankEnvironment

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS = 4
LEAST_PRIORITY = 19


class Job(Generic[Result]):
    """One piece of work that runs in a thread or at once, and whose result is asked for later.

    ``in_background``: run in a thread of the lowest priority; threads that it starts inherit
    it.
    """

    def __init__(self, work: Callable[[], Result], *, in_background: bool) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run_politely, name="background", daemon=True)
        if in_background:
            self._thread.start()
        else:
            self._run()

    @property
    def done(self) -> bool:
        """Whether the work has ended, with a result or an error."""
        return not self._thread.is_alive()

    def result(self) -> Result:
        """Wait for the result and return it; raise what the work raised."""
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run_politely(self) -> None:
        # on Linux each thread has its own priority
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)
        self._run()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error


def threads_of_this_rank() -> int:
    """Return how many threads a rank may keep busy, given the other ranks of its host."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MOST_THREADS, cores // RankEnvironment.read().local_size))


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return [work(item) for item in items], computed in several threads.

    Raises the first error once every thread has ended. Threads inherit the priority of the
    caller.
    """
    todo: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    for numbered in enumerate(items):
        todo.put(numbered)
    size = todo.qsize()

    def take() -> None:
        while not errors:
            try:
                index, item = todo.get_nowait()
                results[index] = work(item)
            except queue.Empty:
                return
            except BaseException as error:
                errors.append(error)

    threads = [
        threading.Thread(target=take, daemon=True)
        for _ in range(min(threads_of_this_rank(), size) - 1)
    ]
    for thread in threads:
        thread.start()
    take()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(size)]
