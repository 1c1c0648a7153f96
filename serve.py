#!/usr/bin/env python3
"""Start a server for the pruned model or its parent, wait until it answers, say where it is; or stop it.

`serve.py pruned|parent [FLAGS] [-- ARGS OF VLLM]` and `serve.py stop`. Runs before any set-up too.
"""

from __future__ import annotations

from moeprune import console, errors
from moeprune.errors import UsageError
from moeprune.serving import engine
from moeprune.settings import resolve

WORDS = ("pruned", "parent", "stop")


def main(argv: list[str]) -> None:
    """The first word says what; what stands behind -- goes to vLLM untouched."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    extra = argv[len(words) + 1 :]
    if words and words[0] in WORDS:
        what, words = words[0], words[1:]
    elif words and not words[0].startswith("-"):
        raise UsageError(f"serve pruned, parent or stop, not {words[0]!r}")
    else:
        what = "pruned"
    settings = resolve("serve", words)
    if what == "stop":
        engine.stop(settings)
        return
    running = engine.start(settings, engine.model_to_serve(settings, what), extra)
    console.say(f"serving {running.model}; ./run.sh stop ends it, its log is {running.log}")
    console.say(f"try: ./run.sh batch --endpoint {running.url} --prompts-path PROMPTS")
    print(running.url)


if __name__ == "__main__":
    errors.run(main)
