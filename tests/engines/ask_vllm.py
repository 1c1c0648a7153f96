"""Run by vLLM's interpreter: MODEL PROMPTS -> {prompt: continuation} as JSON; a prompt is text or tokens."""

import json
import sys


def main() -> None:
    """Greedy, in float32, as transformers computes it."""
    from vllm import LLM, SamplingParams  # its worker processes import this file again

    prompts = json.loads(sys.argv[2])
    words = isinstance(prompts[0], str)
    engine = LLM(
        model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=not words
    )
    asked = prompts if words else [{"prompt_token_ids": tokens} for tokens in prompts]
    outputs = engine.generate(asked, SamplingParams(temperature=0, max_tokens=6 if words else 1), use_tqdm=False)
    answers = [o.outputs[0].text if words else str(list(o.outputs[0].token_ids)) for o in outputs]
    print(json.dumps(dict(zip(map(str, prompts), answers, strict=True))))


if __name__ == "__main__":
    main()
