"""Chat templates in the styles of model families, and the text that each must make of CHAT: written by hand, both."""

from __future__ import annotations

from dataclasses import dataclass, field

CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
)


@dataclass(frozen=True)
class Family:
    """One style. `special` are the tokens that its tokenizer knows as such; the first is begin-of-text where `bos`."""

    template: str
    expected: str
    special: tuple[str, ...]
    bos: bool = False
    thinking: dict[str, str] = field(default_factory=dict)  # setting -> expected text, where the switch shows


CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}"""

QWEN3 = """{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- '<tools>' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'system' and tools %}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- set given = call.function.arguments %}
{%- if given is string %}{{ given }}{% else %}{{ given | tojson }}{% endif %}
{{- '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}
{{- '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}"""

MIXTRAL = """{{ bos_token }}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}"""

DEEPSEEK = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<|Assistant|>' }}
{%- if thinking is defined and thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```' }}{% endfor %}
{{- eos_token }}{% endif %}{% endfor %}"""

GLM = """[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>
{%- if m.role == 'assistant' %}
{%- if enable_thinking is defined and not enable_thinking %}{{ '\\n<think></think>' }}{% endif %}{% endif %}
{{- '\\n' + m.content }}{% endfor %}"""

GPT_OSS = """{{ '<|start|>system<|message|>Current date: ' + strftime_now("%Y-%m-%d") + '<|end|>' }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ '<|start|>developer<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}"""

ERNIE = """{{ cls_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ 'User: ' + m.content + '\\n' }}
{%- elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}
{%- else %}{{ m.content + '\\n' }}{% endif %}
{%- endfor %}"""

GRANITE = """{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>
{% endfor %}"""

_CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n{}4<|im_end|>\n"
)
_LLAMA_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
_DEEPSEEK = "<|bos|>Be brief.<|User|>2+2?<|Assistant|>{}4<|eos|>"

FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML, _CHATML.format(""), ("<|im_start|>", "<|im_end|>")),
    "qwen3": Family(
        QWEN3,
        _CHATML.format(""),
        ("<|im_start|>", "<|im_end|>"),
        thinking={"off": _CHATML.format("<think>\n\n</think>\n\n"), "on": _CHATML.format("")},
    ),
    "llama3": Family(
        LLAMA3,
        "<|begin_of_text|>"
        + _LLAMA_TURN.format("system", "Today Date: 01 Jan 2026\n\nBe brief.")
        + _LLAMA_TURN.format("user", "2+2?")
        + _LLAMA_TURN.format("assistant", "4"),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos=True,
    ),
    "mixtral": Family(MIXTRAL, "<s> [INST] Be brief.\n\n2+2? [/INST] 4</s>", ("<s>", "</s>"), bos=True),
    "gemma": Family(
        GEMMA,
        "<bos><start_of_turn>user\nBe brief.\n\n2+2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos=True,
    ),
    "deepseek": Family(
        DEEPSEEK,
        _DEEPSEEK.format("</think>"),
        ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"),
        bos=True,
        thinking={"off": _DEEPSEEK.format("</think>"), "on": _DEEPSEEK.format("<think>")},
    ),
    "glm": Family(
        GLM,
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\n2+2?<|assistant|>\n4",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        thinking={"off": "[gMASK]<sop><|system|>\nBe brief.<|user|>\n2+2?<|assistant|>\n<think></think>\n4"},
    ),
    "gpt_oss": Family(
        GPT_OSS,
        "<|start|>system<|message|>Current date: 2026-01-01<|end|><|start|>developer<|message|>Be brief.<|end|>"
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
        ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"),
    ),
    "ernie": Family(ERNIE, "<cls>Be brief.\nUser: 2+2?\nAssistant: 4<sep>", ("<cls>", "<sep>"), bos=True),
    "granite": Family(
        GRANITE,
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>2+2?"
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>4<|end_of_text|>\n",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ),
}
