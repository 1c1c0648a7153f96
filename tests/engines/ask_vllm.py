"""Run by vLLM's interpreter: JOBS is JSON, {model folder: prompts}; prints {model folder: answers} as JSON.

A text prompt is answered by its greedy continuation, a prompt of tokens by the log probability of every next token; a
model that vLLM refuses by its reason. All in one process: it takes longer to start than a small model.
"""

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def answers(model: str, prompts: list[Any]) -> list[Any]:
    """In float32, as transformers computes it."""
    words = isinstance(prompts[0], str)
    engine = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=128, max_logprobs=-1, skip_tokenizer_init=not words
    )
    if words:
        outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
        return [output.outputs[0].text for output in outputs]
    every = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": tokens} for tokens in prompts], every, use_tqdm=False)
    tables = [output.outputs[0].logprobs[0] for output in outputs]
    return [[table[token].logprob for token in range(len(table))] for table in tables]


def answers_or_reason(model: str, prompts: list[Any]) -> list[Any] | str:
    """The next model starts from nothing, as this one did."""
    try:
        return answers(model, prompts)
    except (ValueError, NotImplementedError, RuntimeError) as refusal:
        return str(refusal)
    finally:
        cleanup_dist_env_and_memory()


print(json.dumps({model: answers_or_reason(model, prompts) for model, prompts in json.loads(sys.argv[1]).items()}))
