"""Encodes images on all cores and gives the results back in order.

A thread for each process, and a pipe between the two. Why not a pool of processes from the standard
library: a dead process is an error that names the image it had in hand, and processes whose parent
is killed end by themselves, because each holds nothing but its end of one pipe. Nor do they import
the caller's ``__main__``, as multiprocessing's spawn does, so packing works from any script; and a
fork would copy the locks of torch's threads in whatever state they are.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from data_pipeline.packing.image_codec import CodecConfig, ImageCodec, ImageData, LeftOut, Stored

CHUNK = 16  # images handed to a process at once; two chunks a process are in memory at most

Result = Stored | LeftOut
Chunk = Sequence[tuple[int, ImageData]]  # indices and images, in order


def encode_in_order(
    chunks: Iterable[Chunk], config: CodecConfig, workers: int
) -> Iterator[tuple[int, Result]]:
    """Encode every image; yields index and result in the order of the chunks.

    Args:
        chunks: taken one by one, at most two for each process ahead of what is yielded.
        config: of the codec.
        workers: processes; with 1 this process does the work itself.

    Raises:
        WorkerDiedError: a process died; says at which image.
    """
    if workers > 1:
        yield from _encode_on_processes(chunks, config, workers)
        return
    codec = ImageCodec(config)
    for chunk in chunks:
        for index, image in chunk:
            # Entered per image: the caller's code between two of them keeps its own warnings.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = codec.encode(image)
            yield index, result


def _encode_on_processes(
    chunks: Iterable[Chunk], config: CodecConfig, workers: int
) -> Iterator[tuple[int, Result]]:
    free: SimpleQueue[_Worker] = SimpleQueue()
    pending: deque[Future[list[tuple[int, Result]]]] = deque()

    def encode(chunk: Chunk) -> list[tuple[int, Result]]:
        worker = free.get()
        try:
            return worker.encode(chunk)
        finally:
            free.put(worker)

    # On every way out: processes are killed, then no thread waits for one, then pipes are closed.
    with (
        contextlib.ExitStack() as pipes,
        ThreadPoolExecutor(workers) as threads,
        contextlib.ExitStack() as processes,
    ):
        for _ in range(workers):
            worker = _Worker(config)
            pipes.callback(worker.pipe.close)
            processes.callback(worker.kill)
            free.put(worker)
        for chunk in chunks:
            pending.append(threads.submit(encode, chunk))
            if len(pending) == 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


class WorkerDiedError(ChildProcessError):
    """A packing process ended by itself.

    Attributes:
        how: the signal or exit code.
        index: of the image it had in hand.
    """

    def __init__(self, how: str, index: int) -> None:
        super().__init__(f"a packing process died ({how}) at image {index}")
        self.how, self.index = how, index


class _Worker:
    """A process that encodes a chunk at a time."""

    def __init__(self, config: CodecConfig) -> None:
        ours, theirs = socket.socketpair()
        packages = str(Path(__file__).resolve().parent.parent)
        paths = [packages, *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                process_group=0,  # Ctrl-C reaches us only; we end them
            )
        self.pipe = Connection(ours.detach())
        with contextlib.suppress(OSError):  # dead already: found out, and said, at its first chunk
            self.pipe.send(config)

    def encode(self, chunk: Chunk) -> list[tuple[int, Result]]:
        """Indices and results; waits for the process."""
        results: list[tuple[int, Result]] = []
        try:
            self.pipe.send(chunk)
            for index, _ in chunk:
                result = self.pipe.recv()
                if isinstance(result, str):
                    raise RuntimeError(f"a packing process failed:\n{result}")
                results.append((index, result))
        except (EOFError, OSError):
            code = self._process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
            raise WorkerDiedError(how, chunk[len(results)][0]) from None
        return results

    def kill(self) -> None:
        """It holds nothing that would need an orderly end."""
        self._process.kill()
        self._process.wait()


def _work(pipe: Connection) -> None:
    """A process's life: the configuration, then chunks in and results out until the pipe closes."""
    warnings.simplefilter("ignore")  # Pillow's, about images that get their own fate
    try:
        codec = ImageCodec(pipe.recv())
        while True:
            for _, image in pipe.recv():
                pipe.send(codec.encode(image))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has gone, or wants no more
    except Exception:
        pipe.send(traceback.format_exc())


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
