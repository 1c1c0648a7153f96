"""From a sample to token ids: the model's own chat template, applied once, and no second begin-of-text token."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from moeprune.scoring.calibration.samples import Sample

# Templates that print today's date would make other tokens tomorrow.
TODAY = datetime.date(2026, 1, 1)
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# The names that families give to the same switch.
THINKING_NAMES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class Rules:
    """How samples become tokens."""

    max_seq_len: int
    thinking: str = "auto"  # auto | on | off
    system_prompt: str = ""


class Refused(Exception):
    """The chat template does not take this conversation."""


def template_settings(template: Any, tokenizer: Any, tools: list[Any] | None, thinking: str) -> dict[str, Any]:
    """What the template is given besides the messages; where it asks for the time, a copy with a fixed date."""
    chosen: dict[str, Any] = {} if thinking == "auto" else dict.fromkeys(THINKING_NAMES, thinking == "on")
    if isinstance(template, dict):  # several templates, one of them for tools
        template = tokenizer.get_chat_template(tools=tools)
    dated = CLOCK.sub(lambda call: repr(TODAY.strftime(call[2])), template)
    return chosen if dated == tokenizer.chat_template else {**chosen, "chat_template": dated}


def thinking_switch(tokenizer: Any) -> bool:
    """Whether the chat template reads one of the names of the switch."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return any(re.search(rf"\b{name}\b(?!\s*\()", template) for name in THINKING_NAMES)


def render(sample: Sample, tokenizer: Any, rules: Rules, template: Any = None) -> tuple[str, bool]:
    """The text of a sample, and whether the tokenizer may still add its special tokens to it.

    The template is the tokenizer's own, unless a processor brings another.
    """
    if sample.messages is None:
        return sample.text or "", True
    messages = list(sample.messages)
    if rules.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": rules.system_prompt})
    template = template or getattr(tokenizer, "chat_template", None)
    if not template:
        return joined_plainly(messages, sample.as_prompt), True
    tools = None if sample.tools is None else json.loads(sample.tools)
    extra = template_settings(template, tokenizer, tools, rules.thinking)
    reason = ""
    for change in (list, _with_text_arguments, _without_system, _with_parts):
        try:
            made = tokenizer.apply_chat_template(
                change(messages), tools=tools, tokenize=False, add_generation_prompt=False, **extra
            )
        except (TemplateError, TypeError) as error:
            reason = reason or str(error)
        else:
            return str(made), False
    raise Refused(reason)


def _with_text_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Some templates (DeepSeek's) join the arguments of a call as text instead of writing them as JSON."""

    def rewritten(call: Mapping[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return [
        {**message, "tool_calls": [rewritten(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else dict(message)
        for message in messages
    ]


def _without_system(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Some templates (Mixtral's, Gemma's) know no system role: its text then opens the first message of the user."""
    if messages[0]["role"] != "system" or len(messages) < 2 or not isinstance(messages[1]["content"], str):
        return list(map(dict, messages))
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *map(dict, messages[2:])]


def _with_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Some templates of vision models read every content as a list of parts."""

    def parts(content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    return [{**message, "content": parts(message["content"])} for message in messages]


def joined_plainly(messages: Sequence[Mapping[str, Any]], as_prompt: bool) -> str:
    """Without a chat template: prompt and answer as running text, longer chats with the roles written out."""
    texts = [_plain_text(message) for message in messages]
    if as_prompt:
        return "".join(text if text[-1:].isspace() else text + "\n" for text in texts[:-1]) + texts[-1]
    return "\n\n".join(f"{message['role'].capitalize()}: {text}" for message, text in zip(messages, texts, strict=True))


def _plain_text(message: Mapping[str, Any]) -> str:
    content = message.get("content", "")
    text = content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, [text, *calls]))


def encode(text: str, add_special_tokens: bool, tokenizer: Any) -> list[int]:
    """Token ids of a rendered text; text that brings its own begin-of-text token gets no second one."""
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:2] == [begin, begin]:
        return ids[1:]
    return ids
