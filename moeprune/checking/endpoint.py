"""Texts from OpenAI-compatible servers instead of models in memory, for the pruned model and for its parent."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moeprune import console
from moeprune.checking import generation, texts
from moeprune.checking.generation import Text
from moeprune.checking.samples import Sample
from moeprune.errors import MachineError
from moeprune.serving.client import Failed, Server
from moeprune.settings import Settings

NOT_TESTED = "a server gives texts, not distributions; judge the folders to compare them token by token"


class ServedWriter:
    """See `generation.Writer`."""

    def __init__(self, url: str, label: str, settings: Settings) -> None:
        self.label, self.settings = label, settings
        self.server = Server(url, settings.endpoint_key, settings.request_timeout, settings.attempts)

    def write(self, prompts: Sequence[Sample]) -> list[Text]:
        """All prompts, several at a time; one that has no answer in the end ends the judgement."""
        name = self.settings.served_model or self.server.only_model()
        progress = console.Progress(f"{self.label} answers", len(prompts))

        def ask(sample: Sample) -> Text:
            text = self._ask(name, sample.prompt)
            progress.step()
            return text

        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                return list(pool.map(ask, prompts))
            except Failed as error:
                pool.shutdown(cancel_futures=True)
                raise MachineError(f"{self.server.url}: {error}; is the server well?") from None

    def _ask(self, name: str, prompt: str) -> Text:
        body: dict[str, Any] = {"model": name, "temperature": 0, "max_tokens": self.settings.max_new_tokens}
        if self.settings.api == "chat":
            answer, _ = self.server.ask("/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]})
        else:
            answer, _ = self.server.ask("/completions", body | {"prompt": prompt})
        choice = (answer.get("choices") or [{}])[0]
        text = str(choice.get("text") or (choice.get("message") or {}).get("content") or "")
        tokens = int((answer.get("usage") or {}).get("completion_tokens") or len(text.split()))
        return Text(text, tokens, choice.get("finish_reason") != "length", texts.loops(text.split()))


def compare(settings: Settings, written: Sequence[Sample]) -> dict[str, Any]:
    """The part of the report that texts alone can fill."""
    asked = generation.prompts(written, settings.generations)
    own = ServedWriter(settings.endpoint, "pruned model", settings).write(asked)
    parents = None
    if settings.parent_endpoint:
        parents = ServedWriter(settings.parent_endpoint, "parent", settings).write(asked)
    return {
        "generation": generation.judge(asked, parents, own, bool(settings.evaluation_path)),
        "not_tested": {"fidelity": NOT_TESTED, "structure": NOT_TESTED},
    }
