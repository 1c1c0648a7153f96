"""Run by llama.cpp's interpreter: MODEL PROMPTS -> the logits of each prompt's last token as JSON."""

import json
import sys

from llama_cpp import Llama

model = Llama(sys.argv[1], n_ctx=64, n_threads=1, logits_all=True, verbose=False)
found = []
for prompt in json.loads(sys.argv[2]):
    model.reset()
    model.eval(prompt)
    found.append([float(value) for value in model._scores[len(prompt) - 1]])
print(json.dumps({"logits": found}))
