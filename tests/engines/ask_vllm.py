"""Run by vLLM's interpreter: JOBS is a file of JSON, [{"model", "prompts", ...}]; prints the answers to each as JSON.

A text prompt is answered by its greedy continuation, a prompt of tokens by the log probability of every next token; a
model that vLLM refuses by its reason. All in one process: it takes longer to start than a small model.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def without(engine: LLM, dropped: dict[str, list[int]]) -> None:
    """From now on the routers do not choose these experts."""
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    for router, experts in dropped.items():

        def forbid(module: torch.nn.Module, given: Any, output: Any, experts: list[int] = experts) -> None:
            output[0][:, experts] = float("-inf")

        model.get_submodule(router).register_forward_hook(forbid)


def answers(
    model: str, prompts: list[Any], dtype: str = "float32", dropped: dict[str, list[int]] | None = None
) -> list[Any]:
    """What the engine says, perhaps without some of the experts."""
    words = isinstance(prompts[0], str)
    engine = LLM(
        model, dtype=dtype, enforce_eager=True, max_model_len=128, max_logprobs=-1, skip_tokenizer_init=not words
    )
    without(engine, dropped or {})
    if words:
        outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
        return [output.outputs[0].text for output in outputs]
    every = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    alone = [engine.generate({"prompt_token_ids": tokens}, every, use_tqdm=False)[0] for tokens in prompts]
    tables = [output.outputs[0].logprobs[0] for output in alone]  # prompts that run together round otherwise
    return [[table[token].logprob for token in range(len(table))] for table in tables]


def answers_or_reason(job: dict[str, Any]) -> list[Any] | str:
    """The next model starts from nothing, as this one did."""
    try:
        return answers(**job)
    except (ValueError, NotImplementedError, RuntimeError) as refusal:
        return str(refusal)
    finally:
        cleanup_dist_env_and_memory()


print(json.dumps([answers_or_reason(job) for job in json.loads(Path(sys.argv[1]).read_text())]))
