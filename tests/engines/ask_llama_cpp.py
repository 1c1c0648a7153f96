"""Run by llama.cpp's interpreter: MODEL PROMPTS -> {prompt: continuation} as JSON."""

import json
import sys

from llama_cpp import Llama

model = Llama(sys.argv[1], n_ctx=128, verbose=False)
answers = {p: model(p, max_tokens=6, temperature=0.0)["choices"][0]["text"] for p in json.loads(sys.argv[2])}
print(json.dumps(answers))
