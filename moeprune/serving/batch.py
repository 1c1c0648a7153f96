"""Many prompts at a time, each asked until it has an answer, each answer kept before the next one counts."""

from __future__ import annotations

import datetime
import json
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeprune import console
from moeprune.errors import MachineError, StageError, UsageError
from moeprune.metadata import digest
from moeprune.serving.answers import Answers
from moeprune.serving.client import Failed, Server, Stopped
from moeprune.serving.prompts import Prompt
from moeprune.settings import Settings

FAILURES_SHOWN = 5


@dataclass(frozen=True)
class Wishes:
    """How the model is to answer."""

    model: str
    api: str  # chat | completions
    max_tokens: int
    temperature: float
    seed: int
    concurrency: int

    @staticmethod
    def of(settings: Settings, model: str) -> Wishes:
        """The wishes in the settings."""
        return Wishes(
            model, settings.api, settings.max_new_tokens, settings.temperature, settings.seed, settings.concurrency
        )


def run(prompts: Sequence[Prompt], answers: Answers, server: Server, wishes: Wishes) -> int:
    """Ask whatever has no answer to the same question yet; the number of prompts that stay without one."""
    waiting: queue.SimpleQueue[Prompt] = queue.SimpleQueue()
    for prompt in prompts:
        if wishes.api == "completions" and prompt.text is None:
            raise UsageError(f"{prompt.id} is a conversation or has images; use --api chat")
        if answers.done.get(prompt.id, {}).get("question_sha256") != fingerprint(prompt, wishes):
            waiting.put(prompt)
    count = waiting.qsize()
    if count < len(prompts):
        console.say(f"{len(prompts) - count} of {len(prompts)} prompts have their answer already")
    arrived: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
    for _ in range(min(wishes.concurrency, count)):
        threading.Thread(target=_work, args=(waiting, arrived, server, wishes), daemon=True).start()
    try:
        return _collect(count, arrived, answers, 3 * wishes.concurrency)
    finally:
        server.stop.set()  # whoever waits for another attempt gives up


def _collect(count: int, arrived: queue.SimpleQueue[Any], answers: Answers, patience: int) -> int:
    """Only this thread writes. After `patience` failures in a row the server is given up."""
    bar = console.Progress("answers", count)
    failed = in_a_row = tokens = 0
    started = time.monotonic()
    for _ in range(count):
        item = arrived.get()
        if isinstance(item, Failed):
            failed, in_a_row = failed + 1, in_a_row + 1
            if failed <= FAILURES_SHOWN:
                console.say(f"no answer: {item}")
            if in_a_row >= patience:
                raise MachineError(f"the last {in_a_row} prompts failed ({item}); run the same command again to go on")
        elif isinstance(item, Exception):
            raise item
        else:
            in_a_row = 0
            answers.append(item)
            tokens += item["completion_tokens"] or 0
        speed = tokens / max(time.monotonic() - started, 1e-9)
        bar.step(", ".join(f"{n:.0f} {what}" for n, what in ((speed, "tokens/s"), (failed, "failed")) if n))
    return failed


def _work(waiting: queue.SimpleQueue[Prompt], arrived: queue.SimpleQueue[Any], server: Server, wishes: Wishes) -> None:
    """One prompt after another until none waits or the run ends."""
    while not server.stop.is_set():
        try:
            prompt = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            arrived.put(_answer(prompt, server, wishes))
        except Failed as error:
            arrived.put(Failed(f"{prompt.id}: {error}"))
        except Stopped:
            return
        except (StageError, OSError) as error:
            arrived.put(error)


def question(prompt: Prompt, wishes: Wishes) -> tuple[str, dict[str, Any]]:
    """Path and body of the request."""
    body = {"model": wishes.model, "max_tokens": wishes.max_tokens, "temperature": wishes.temperature}
    if wishes.api == "chat":
        return "/chat/completions", body | {"seed": wishes.seed, "messages": prompt.chat()}
    return "/completions", body | {"seed": wishes.seed, "prompt": prompt.text}


def fingerprint(prompt: Prompt, wishes: Wishes) -> str:
    """Over everything that decides the answer; how many are asked at a time does not."""
    asked = [wishes.model, wishes.api, wishes.max_tokens, wishes.temperature, wishes.seed, prompt.messages]
    return digest(json.dumps(asked), *prompt.images)


def _answer(prompt: Prompt, server: Server, wishes: Wishes) -> dict[str, Any]:
    start = time.monotonic()
    text, finish, usage, attempts = _ask(server, *question(prompt, wishes))
    used = usage.get("completion_tokens")
    return {
        "id": prompt.id,
        "messages": list(prompt.messages),
        "images": [str(image) for image in prompt.images],
        "answer": text,
        "finish_reason": finish,
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": used if used is not None else server.count_tokens(wishes.model, text),
        "seconds": round(time.monotonic() - start, 3),
        "attempts": attempts,
        "model": wishes.model,
        "endpoint": server.url,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "question_sha256": fingerprint(prompt, wishes),
    }


def _ask(server: Server, path: str, body: dict[str, Any]) -> tuple[str, str, dict[str, Any], int]:
    answer, attempts = server.ask(path, body)
    try:
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Failed(f"the answer has no choices: {str(answer)[:200]}") from None
    usage = answer.get("usage")
    return text or "", str(choice.get("finish_reason")), usage if isinstance(usage, dict) else {}, attempts
