"""Image files to pixels, in order and ahead of their use; a reader that hangs costs its image."""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import queue
import resource
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from prumerge_jax.data.images import ImageError, OneOfSeveral, Shown
from prumerge_jax.messages import shortened

TIMEOUT_SECONDS = 120
"""Time after which a reader is taken to hang on its image."""

Named = tuple[str, Shown | OneOfSeveral]
"""What to call an image in an error, and where it is."""

_Pixels = TypeVar("_Pixels")
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")

Processor = Callable[[Any, str], _Pixels]
"""Makes pixels of an image; the name is for errors."""


def in_threads(
    function: Callable[[_Item], _Found], items: Iterable[_Item], *, at_once: int
) -> Iterator[_Found]:
    """`function` of each item in order, of which `at_once` are taken at a time; for functions that
    open images. Disks and networks are waited for, and decoding releases the interpreter's lock."""
    # Opening an image changes the filters of warnings, which threads share; they are restored here.
    iterator = iter(items)
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor() as pool:
        while some := list(itertools.islice(iterator, at_once)):
            yield from pool.map(function, some)


def stream_pixels(
    images: Iterable[Named | None],
    processor: Processor[_Pixels],
    *,
    num_workers: int,
    ahead: int = 64,
) -> Iterator[_Pixels | ImageError | None]:
    """Yields the pixels of every image in turn, None where there is none.

    An image that is repeated within `ahead` is decoded once, without workers only if it is repeated
    immediately. One that is not decoded within `TIMEOUT_SECONDS` is an error; the others are
    read by a new reader.

    Args:
      images: names and sources.
      processor: makes pixels of an image.
      num_workers: processes; 0 decodes in this one. Started afresh, not forked: the parent may
        hold an accelerator. A script must therefore guard its main part by `__name__`.
      ahead: how many images may be in progress before they are requested.
    """
    if num_workers == 0:
        yield from _stream_here(images, processor)
        return
    iterator = iter(images)
    waiting: collections.deque[tuple[str, concurrent.futures.Future] | None] = collections.deque()
    recent: dict[str, concurrent.futures.Future] = {}
    with contextlib.closing(ReaderPool(num_workers, TIMEOUT_SECONDS)) as pool:

        def submit(count: int) -> None:
            for named in itertools.islice(iterator, count):
                if named is None:
                    waiting.append(None)
                    continue
                name = named[0]
                if name not in recent:
                    recent[name] = pool.submit(named, processor)
                waiting.append((name, recent[name]))

        submit(ahead)
        while waiting:
            entry = waiting.popleft()
            submit(1)
            if entry is None:
                yield None
                continue
            name, future = entry
            if not any(other and other[0] == name for other in waiting):
                recent.pop(name, None)
            yield future.result()


def load_pixels(named: Named, processor: Processor[_Pixels]) -> _Pixels | ImageError:
    """The pixels, or the error that says why not."""
    name, source = named
    try:
        return processor(source, name)
    except ImageError as error:
        return error
    except MemoryError:
        return ImageError(f"{shortened(name)}: decoding it takes more memory than is allowed")


def _stream_here(
    images: Iterable[Named | None], processor: Processor[_Pixels]
) -> Iterator[_Pixels | ImageError | None]:
    last: tuple[str, _Pixels | ImageError] | None = None
    for named in images:
        if named is None:
            yield None
            continue
        if last is None or last[0] != named[0]:
            last = named[0], _load_in_thread(named, processor)
        yield last[1]


def _load_in_thread(named: Named, processor: Processor[_Pixels]) -> _Pixels | ImageError:
    """`load_pixels` in a thread that is left alone when it hangs."""
    result: queue.SimpleQueue[_Pixels | ImageError] = queue.SimpleQueue()
    threading.Thread(target=lambda: result.put(load_pixels(named, processor)), daemon=True).start()
    try:
        return result.get(timeout=TIMEOUT_SECONDS)
    except queue.Empty:
        return _timed_out(named[0], TIMEOUT_SECONDS)


def _timed_out(name: str, seconds: float) -> ImageError:
    return ImageError(f"{shortened(name)}: not decoded within {seconds:g} seconds")


class ReaderPool:
    """Reader processes, each driven by a separate thread.

    Args:
      size: processes; they are started with their first image, afresh and not forked.
      timeout_seconds: time after which a reader is taken to hang on its image, and replaced.
      memory_bytes: most address space of a reader, above which its image is refused; None sets no
        limit.
    """

    def __init__(self, size: int, timeout_seconds: float, memory_bytes: int | None = None) -> None:
        self._readers = [_Reader(timeout_seconds, memory_bytes) for _ in range(size)]
        self._idle: queue.SimpleQueue[_Reader] = queue.SimpleQueue()
        for reader in self._readers:
            self._idle.put(reader)
        self._threads = concurrent.futures.ThreadPoolExecutor(size)

    def submit(
        self, named: Named, processor: Processor[_Pixels]
    ) -> concurrent.futures.Future[_Pixels | ImageError]:
        """The pixels of an image, or the error that says why not, when a reader has made them."""
        return self._threads.submit(self._read, named, processor)

    def close(self) -> None:
        """Ends all readers, whatever they do."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def _read(self, named: Named, processor: Processor[_Pixels]) -> _Pixels | ImageError:
        reader = self._idle.get()
        try:
            return reader.read(named, processor)
        finally:
            self._idle.put(reader)


class _Reader:
    """A process that decodes one image after the other; another one follows where it hangs."""

    def __init__(self, timeout_seconds: float, memory_bytes: int | None) -> None:
        self._timeout, self._memory_bytes = timeout_seconds, memory_bytes
        self._lock = threading.Lock()
        self._running: tuple[multiprocessing.process.BaseProcess, Connection] | None = None
        self._is_closed = False

    def read(self, named: Named, processor: Processor[_Pixels]) -> _Pixels | ImageError:
        try:
            connection = self._connection()
            connection.send((named, processor))
            if connection.poll(self._timeout):
                return connection.recv()
            error = _timed_out(named[0], self._timeout)
        except (EOFError, OSError):
            error = ImageError(f"{shortened(named[0])}: the process that decoded it ended")
        self._kill()
        return error

    def close(self) -> None:
        self._is_closed = True
        self._kill()

    def _connection(self) -> Connection:
        with self._lock:
            if self._is_closed:
                raise EOFError
            if self._running is None:
                context = multiprocessing.get_context("spawn")
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, self._memory_bytes), daemon=True
                )
                process.start()
                theirs.close()  # so that the process's end is heard
                self._running = process, ours
            return self._running[1]

    def _kill(self) -> None:
        with self._lock:
            if self._running is not None:
                self._running[0].kill()  # its connection ends with it
                self._running = None


def _serve(connection: Connection, memory_bytes: int | None) -> None:
    """What a reader process does until its parent is gone."""
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            named, processor = connection.recv()
            connection.send(load_pixels(named, processor))
