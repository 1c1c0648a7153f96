"""Run by MLX's interpreter: MODEL PROMPTS -> {prompt: continuation} as JSON."""

import json
import sys

from mlx_lm import generate, load

model, tokenizer = load(sys.argv[1])
print(json.dumps({p: generate(model, tokenizer, prompt=p, max_tokens=6) for p in json.loads(sys.argv[2])}))
