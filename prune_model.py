"""Stage 2: write the smaller model. Needs no GPU and no torch; every byte that stays is the parent's."""

from __future__ import annotations

import gc
import json
import time

from moeprune import console, errors
from moeprune.checkpoint import families, formats, writer
from moeprune.checkpoint.folder import check_outside, locate_model, open_checkpoint, warn_of_other_weights
from moeprune.console import say
from moeprune.planning.decision import check_words
from moeprune.pruning import result
from moeprune.pruning.choice import choose, gone_tensors, without
from moeprune.pruning.making import make
from moeprune.pruning.result import Result
from moeprune.settings import resolve


def main(argv: list[str]) -> None:
    """Scores or a plan -> one action for every tensor -> a new folder beside -> proof -> its name."""
    settings = resolve("prune", argv)
    check_words(settings)
    checkpoint = open_checkpoint(locate_model(settings.model_path, settings.hf_token))
    check_outside(checkpoint.place, settings.output_path)
    layout = families.understand(checkpoint)
    formats.check_cuttable(checkpoint, layout)
    gone = gone_tensors(settings, checkpoint, layout)
    layout = without(layout, gone)
    choice = choose(settings, checkpoint, layout, gone)
    planned = result.plan(settings, checkpoint, layout, choice, gone)
    result.check_place(planned)
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
    """Write beside the target, prove all of it against the parent, then rename."""
    started = time.monotonic()
    with writer.beside(planned.target) as folder:
        make(planned, folder)
        writer.publish(folder, planned.target)
    say(f"written and verified in {console.duration(time.monotonic() - started)}: {planned.target}")


if __name__ == "__main__":
    gc.disable()  # nothing here makes cycles; among 100,000 tensors the search for them took a third of the preparation
    errors.run(main)
