"""Stage 2: write the smaller model. Needs no GPU and no torch; every byte that stays is the parent's."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from threading import Event

from moeprune import console, errors
from moeprune.checkpoint import families, formats, writer
from moeprune.checkpoint.folder import locate_model, open_checkpoint, warn_of_other_weights
from moeprune.console import say
from moeprune.planning.decision import check_words
from moeprune.pruning import result
from moeprune.pruning.choice import choose, gone_tensors, without
from moeprune.pruning.result import Result
from moeprune.settings import resolve


def main(argv: list[str]) -> None:
    """Scores or a plan -> one action for every tensor -> a new folder beside -> proof -> its name."""
    settings = resolve("prune", argv)
    check_words(settings)
    checkpoint = open_checkpoint(locate_model(settings.model_path, settings.hf_token))
    layout = families.understand(checkpoint)
    formats.check_cuttable(checkpoint, layout)
    gone = gone_tensors(settings, checkpoint, layout)
    layout = without(layout, gone)
    choice = choose(settings, checkpoint, layout, gone)
    planned = result.plan(settings, checkpoint, layout, choice, gone)
    if not settings.force and planned.is_current():
        say(f"{planned.target} is current: {choice.count} of {layout.experts} experts, same scores, same model")
        print(planned.target)
        return
    result.describe(planned)
    warn_of_other_weights(checkpoint)
    if settings.dry_run:
        say("dry run: nothing was written")
        print(json.dumps(result.prediction(planned)))
        return
    result.check_target(planned, settings.force)
    cut(planned)
    print(planned.target)


def cut(planned: Result) -> None:
    """Write beside the target, prove every file against the parent as soon as it is there, then rename."""
    started = time.monotonic()
    bar = console.Progress("writing", len(planned.files))
    with writer.beside(planned.target) as folder, helpers() as (copying, settling, go_on):
        proof = result.proof(planned, folder)
        settled: list[Future[None]] = []

        def make(file: writer.NewFile) -> str:
            path = writer.write_file(folder, file, go_on)
            settled.extend([settling.submit(writer.sync_file, path), settling.submit(proof.file, path, go_on)])
            return file.name

        tasks = [copying.submit(make, file) for file in planned.files]
        result.write_small_files(planned, folder)
        for task in as_completed(tasks):
            bar.step(task.result())
        for waiting in settled:
            waiting.result()
        proof.finish(planned.checkpoint.other_weights)
        writer.publish(folder, planned.target)
    say(f"written and verified in {console.duration(time.monotonic() - started)}: {planned.target}")


@contextmanager
def helpers() -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor, Callable[[], None]]]:
    """Threads that copy, and threads that sync and compare the copies; after an error they stop at their next step."""
    stop = Event()

    def go_on() -> None:
        if stop.is_set():
            raise errors.Interrupted

    count = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(2 * count) as settling, ThreadPoolExecutor(count) as copying:
        try:
            yield copying, settling, go_on
        except BaseException:
            stop.set()
            raise


if __name__ == "__main__":
    errors.run(main)
