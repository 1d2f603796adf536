"""Encodes images on all cores and gives the results back in order.

Why not a pool from the standard library: memory stays bounded however uneven the images are, a
dead process is an error that names the image it had in hand, and processes whose parent is killed
end by themselves, because each holds nothing but its end of one pipe. Nor do they import the
caller's ``__main__``, as multiprocessing's spawn does, so packing works from any script; and a fork
would copy the locks of torch's threads in whatever state they are.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from data_pipeline.packing.image_codec import CodecConfig, ImageCodec, ImageData, LeftOut, Stored

CHUNK = 64  # images handed to a process at once
_SEND_BYTES = 1 << 20  # results are sent together up to this size: a message costs some 50 us
_BUFFER_BYTES = 1 << 28  # results held back because an earlier image is not done yet

Result = Stored | LeftOut
Chunk = Sequence[tuple[int, ImageData]]  # indices and images, in order


def encode_in_order(
    chunks: Iterable[Chunk], config: CodecConfig, workers: int
) -> Iterator[tuple[int, Result]]:
    """Encode every image; yields index and result in the order of the chunks.

    Args:
        chunks: taken one by one, as processes become free.
        config: of the codec.
        workers: processes; with 1 this process does the work itself.

    Raises:
        ChildProcessError: a process died; the message names the index it was working on.
    """
    if workers > 1:
        with _Pool(config, workers) as pool:
            yield from pool.encode(chunks)
        return
    codec = ImageCodec(config)
    for chunk in chunks:
        for index, image in chunk:
            # Entered per image: the caller's code between two of them keeps its own warnings.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = codec.encode(image)
            yield index, result


@dataclass(eq=False)
class _Worker:
    process: "subprocess.Popen[bytes]"
    pipe: Connection
    in_hand: int  # descriptor of a file with the index it is working on
    chunk: int = -1  # number of the chunk in hand
    unfinished: list[int] = field(default_factory=list)  # its indices still to come, in order


class _Pool:
    """Processes with a pipe each. A chunk goes only to a process that has reported its last done.

    So neither end ever blocks on sending while the other does: a process that sends is read from,
    and one that is sent to is waiting for it.
    """

    def __init__(self, config: CodecConfig, workers: int) -> None:
        self._workers: list[_Worker] = []
        self._ready: dict[int, list[tuple[int, Result]]] = {}  # chunk number -> results so far
        self._ready_bytes = 0
        try:
            for _ in range(workers):
                self._workers.append(_start(config))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()  # it holds nothing that would need an orderly end
        for worker in self._workers:
            worker.process.wait()
            worker.pipe.close()
            os.close(worker.in_hand)

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[int, Result]]:
        """As :func:`encode_in_order`."""
        numbered = enumerate(chunks)
        idle, busy = list(self._workers), dict[Connection, _Worker]()
        head = 0  # the chunk whose results come next
        while True:
            while idle and (task := next(numbered, None)) is not None:
                worker = idle.pop()
                self._hand_out(worker, *task)
                busy[worker.pipe] = worker
            if not busy:
                return
            for worker in self._wait(busy, head):
                self._receive(worker)
                if not worker.unfinished:
                    del busy[worker.pipe]
                    idle.append(worker)
            in_work = {worker.chunk for worker in busy.values()}
            while head in self._ready:
                yield from self._take(head)
                if head in in_work:
                    break
                del self._ready[head]
                head += 1

    def _wait(self, busy: dict[Connection, _Worker], head: int) -> list[_Worker]:
        """Processes that have sent something.

        With too much held back, only the one whose results come next is listened to; the others
        then wait in their sends, which bounds our memory.
        """
        pipes = list(busy)
        if self._ready_bytes > _BUFFER_BYTES:
            pipes = [pipe for pipe, worker in busy.items() if worker.chunk == head]
        return [busy[pipe] for pipe in connection.wait(pipes) if isinstance(pipe, Connection)]

    def _hand_out(self, worker: _Worker, number: int, chunk: Chunk) -> None:
        worker.chunk = number
        worker.unfinished = [index for index, _ in chunk]
        self._ready[number] = []
        try:
            worker.pipe.send(chunk)
        except OSError:  # it died while idle
            self._raise_death(worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            results = worker.pipe.recv()
        except (EOFError, OSError):
            self._raise_death(worker)
        if isinstance(results, str):
            raise RuntimeError(f"a packing process failed:\n{results}")
        for result in results:
            if isinstance(result, Stored):
                self._ready_bytes += len(result.payload)
            self._ready[worker.chunk].append((worker.unfinished.pop(0), result))

    def _take(self, chunk: int) -> Iterator[tuple[int, Result]]:
        results, self._ready[chunk] = self._ready[chunk], []
        for index, result in results:
            if isinstance(result, Stored):
                self._ready_bytes -= len(result.payload)
            yield index, result

    def _raise_death(self, worker: _Worker) -> NoReturn:
        code = worker.process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        index = os.pread(worker.in_hand, 8, 0)
        raise WorkerDiedError(how, int.from_bytes(index, "little") if index else None)


class WorkerDiedError(ChildProcessError):
    """A packing process ended by itself.

    Attributes:
        how: the signal or exit code.
        index: of the image it had in hand; None if none.
    """

    def __init__(self, how: str, index: int | None) -> None:
        super().__init__(f"a packing process died ({how}) at image {index}")
        self.how, self.index = how, index


def _start(config: CodecConfig) -> _Worker:
    ours, theirs = socket.socketpair()
    packages = str(Path(__file__).resolve().parent.parent)
    paths = [packages, *filter(None, [os.environ.get("PYTHONPATH")])]
    with theirs, tempfile.TemporaryFile() as in_hand:
        descriptors = (theirs.fileno(), in_hand.fileno())
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            process_group=0,  # Ctrl-C reaches us only; we end them
        )
        worker = _Worker(process, Connection(ours.detach()), os.dup(in_hand.fileno()))
    with contextlib.suppress(OSError):  # dead already: found out, and said, at its first chunk
        worker.pipe.send(config)
    return worker


def _work(pipe: Connection, in_hand: int) -> None:
    """A process's life: the configuration, then chunks in and results out until the pipe closes."""
    warnings.simplefilter("ignore")  # Pillow's, about images that get their own fate
    try:
        codec = ImageCodec(pipe.recv())
        while True:
            chunk: Chunk = pipe.recv()
            batch: list[Result] = []
            size = 0
            for index, image in chunk:
                os.pwrite(in_hand, index.to_bytes(8, "little"), 0)
                result = codec.encode(image)
                batch.append(result)
                size += len(result.payload) if isinstance(result, Stored) else 0
                if size >= _SEND_BYTES:
                    pipe.send(batch)
                    batch, size = [], 0
            if batch:
                pipe.send(batch)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has gone, or wants no more
    except Exception:
        pipe.send(traceback.format_exc())


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])), int(sys.argv[2]))
