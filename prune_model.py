"""Stage 2: write the smaller model. Needs no GPU and no torch; every byte that stays is the parent's."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

from moeprune import console, errors
from moeprune.checkpoint import families, writer
from moeprune.checkpoint.folder import locate_model, open_checkpoint, warn_of_other_weights
from moeprune.console import say
from moeprune.pruning import result
from moeprune.pruning.choice import choose
from moeprune.pruning.result import Result
from moeprune.pruning.verify import Verification
from moeprune.settings import resolve


def main(argv: list[str]) -> None:
    """Scores or a plan -> one action for every tensor -> a new folder beside -> proof -> its name."""
    settings = resolve("prune", argv)
    checkpoint = open_checkpoint(locate_model(settings.model_path, settings.hf_token))
    layout = families.understand(checkpoint)
    gone = families.mtp_tensors(checkpoint, layout) if settings.drop_mtp else frozenset()
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
    """Write beside the target, prove the bytes against the parent while more are written, then rename."""
    started = time.monotonic()
    bar = console.Progress("writing", len(planned.files))
    with writer.beside(planned.target) as folder, ThreadPoolExecutor(2) as helpers:
        proof = Verification(planned.checkpoint.folder, folder, planned.choice.keep, planned.gone)
        pending = []
        for file in planned.files:
            path = writer.write_file(folder, file)
            pending += [helpers.submit(writer.sync_file, path), helpers.submit(proof.file, path)]
            bar.step(file.name)
        pending += [helpers.submit(writer.sync_file, path) for path in result.write_small_files(planned, folder)]
        for task in pending:
            task.result()
        proof.finish(planned.checkpoint.other_weights)
        writer.publish(folder, planned.target)
    seconds = time.monotonic() - started
    say(f"written and verified in {console.duration(seconds)}: {planned.target}")


if __name__ == "__main__":
    errors.run(main)
