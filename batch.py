#!/usr/bin/env python3
"""Send many prompts to an OpenAI-compatible server and keep every answer; killed at any moment, a re-run goes on."""

from __future__ import annotations

from pathlib import Path

from moeprune import console, errors
from moeprune.errors import MachineError, UsageError
from moeprune.serving import batch
from moeprune.serving.answers import Answers, read_answers, write_comparison
from moeprune.serving.client import Server
from moeprune.serving.prompts import load_prompts
from moeprune.settings import resolve


def main(argv: list[str]) -> None:
    """Prompts -> what has no answer yet -> answers, each on the disk as it arrives."""
    settings = resolve("batch", argv)
    prompts = load_prompts(_needed(settings.prompts_path, "prompts", "--prompts-path"))
    _needed(settings.endpoint, "server", "--endpoint http://127.0.0.1:8000/v1")
    server = Server(settings.endpoint, settings.endpoint_key, settings.request_timeout, settings.attempts)
    path = Path(settings.answers_path) if settings.answers_path else settings.output_path / "answers.jsonl"
    other = read_answers(_needed(settings.compare, "answers", "--compare")) if settings.compare else None
    with Answers(path) as answers:
        model = settings.served_model or server.only_model()
        failed = batch.run(prompts, answers, server, batch.Wishes.of(settings, model))
        asked = {prompt.id for prompt in prompts}
        mine = {name: answer for name, answer in answers.done.items() if name in asked}
    if other is not None:
        write_comparison(path.with_suffix(".html"), mine, other)
    print(path)
    if failed:
        raise MachineError(f"{failed} of {len(prompts)} prompts have no answer; run the same command again to go on")
    console.say(f"{len(prompts)} prompts answered: {path}")


def _needed(text: str, what: str, flag: str) -> Path:
    if not text:
        raise UsageError(f"no {what} given; say which with {flag}")
    return Path(text)


if __name__ == "__main__":
    errors.run(main)
