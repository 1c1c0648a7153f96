"""Fill the folder of a result: files are copied, brought to the disk and proven at the same time, each by its threads.

A file is compared with the parent as soon as it is finished, while both are still in memory, and the disk begins with
what a growing file holds, so that it is not idle until the first one is finished.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

from moeprune import errors
from moeprune.checkpoint import writer
from moeprune.console import Progress
from moeprune.pruning import result
from moeprune.pruning.result import Result

THREADS = min(4, os.cpu_count() or 1)  # of each kind; more only wait for the memory or the disk
SWITCH = 0.0005  # seconds that one thread keeps the interpreter; with the usual 5 ms the copying waits for the proof
PAUSE = 0.02  # seconds from one request that the disk begin with a file to the next


@dataclass
class Crew:
    """Threads of three kinds, and the jobs they were given; jobs may add further ones before they end."""

    copying: ThreadPoolExecutor
    syncing: ThreadPoolExecutor
    proving: ThreadPoolExecutor
    stop: Event = field(default_factory=Event)
    given: list[Future[Any]] = field(default_factory=list)
    ended: SimpleQueue[Future[Any]] = field(default_factory=SimpleQueue)

    def give(self, pool: ThreadPoolExecutor, work: Callable[..., Any], *args: object) -> Future[Any]:
        """Start a job that `results` waits for."""
        job = pool.submit(work, *args)
        self.given.append(job)
        job.add_done_callback(self.ended.put)
        return job

    def results(self) -> Iterator[Any]:
        """What the jobs give, as they end; the first that fails raises here."""
        count = 0
        while count < len(self.given):
            yield self.ended.get().result()
            count += 1

    def go_on(self) -> None:
        """Called in all long work, to end it when other work has failed."""
        if self.stop.is_set():
            raise errors.Interrupted

    def steps(self, path: Path) -> Callable[[], None]:
        """`go_on` for the copying of one file, which also keeps the disk busy with it."""
        last, request = time.monotonic(), None

        def step() -> None:
            nonlocal last, request
            self.go_on()
            if time.monotonic() - last > PAUSE and (request is None or request.done()):
                request = self.syncing.submit(writer.start_syncing, path)
                last = time.monotonic()

        return step


@contextmanager
def crew() -> Iterator[Crew]:
    """The threads; after an error they stop at their next step."""
    before = sys.getswitchinterval()
    with ExitStack() as stack:
        stack.callback(sys.setswitchinterval, before)
        sys.setswitchinterval(SWITCH)
        syncing, proving, copying = (stack.enter_context(ThreadPoolExecutor(THREADS)) for _ in range(3))
        made = Crew(copying, syncing, proving)
        try:
            yield made
        except BaseException:
            made.stop.set()
            raise


def make(planned: Result, folder: Path) -> None:
    """Fill the folder; behind this, all of it is on the disk and equal to the parent wherever it must be."""
    bar = Progress("writing", len(planned.files))
    with crew() as threads:
        proof = threads.give(threads.proving, result.proof, planned, folder)

        def prove(path: Path) -> None:
            for part in proof.result().read(path, THREADS):
                threads.give(threads.proving, proof.result().compare, part, threads.go_on)

        def copy(file: writer.NewFile) -> writer.NewFile:
            path = writer.write_file(folder, file, threads.steps(folder / file.name))
            threads.give(threads.syncing, writer.sync_file, path)
            threads.give(threads.proving, prove, path)
            return file

        for file in planned.files:
            threads.give(threads.copying, copy, file)
        result.write_small_files(planned, folder)
        for done in threads.results():
            if isinstance(done, writer.NewFile):
                bar.step(done.name)
        proof.result().finish(planned.checkpoint.other_weights)
