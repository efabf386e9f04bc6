"""Threads that fetch bodies while the task decodes others; how many there are bounds its memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from queue import Empty, SimpleQueue

from pipelines.bodies import Bodies
from pipelines.outcomes import NotStored, not_stored


@contextmanager
def arriving(
    todo: list[tuple[int, str]], bodies: Bodies, num_threads: int
) -> Iterator[Iterator[tuple[int, bytes | NotStored]]]:
    """Bodies as they come. Each that is taken lets the next be asked for."""
    asked = SimpleQueue[tuple[int, str] | None]()
    arrived = SimpleQueue[tuple[int, bytes | NotStored]]()
    remaining = iter(todo)

    def fetch() -> None:
        while (item := asked.get()) is not None:
            arrived.put((item[0], fetch_body(item[1], bodies)))

    def taken() -> Iterator[tuple[int, bytes | NotStored]]:
        for item in islice(remaining, num_threads):
            asked.put(item)
        for _ in todo:
            found = arrived.get()
            for item in islice(remaining, 1):
                asked.put(item)
            yield found

    threads: list[threading.Thread] = []
    try:
        for number in range(min(num_threads, len(todo))):
            thread = threading.Thread(target=fetch, name=f"fetch-{number}")
            thread.start()
            threads.append(thread)
        yield taken()
    finally:
        with suppress(Empty):  # after an error, what is asked for is not wanted any more
            while True:
                asked.get_nowait()
        for _ in threads:
            asked.put(None)
        for thread in threads:
            thread.join()


def fetch_body(url: str, bodies: Bodies) -> bytes | NotStored:
    """What lies behind the URL, or how the row ended."""
    try:
        return bodies.fetch(url)
    except Exception as error:
        return not_stored(error)
