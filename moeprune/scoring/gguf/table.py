"""Which model of transformers a GGUF file holds: its configuration and the names of its tensors.

A GGUF file has neither config.json nor the names that transformers knows. TABLE says for each architecture of llama.cpp
what its keys and names stand for; sizes are read from the tensors where they can be. To add an architecture, add an
entry to the table of its kind.
"""

from __future__ import annotations

from moeprune.scoring.gguf import delta, hybrid, plain, shared

WITHOUT = ("arctic", "bailingmoe", "bailingmoe2", "deepseek", "grok", "grovemoe", "llada-moe", "rnd1", "smallthinker")
REFUSED = dict.fromkeys(WITHOUT, "transformers has no such model") | {
    **dict.fromkeys(("glm5-next", "step35"), "transformers has it together with its pictures only"),
    "hy_v4": "transformers and llama.cpp turn its queries and keys in different ways",
    "minimax-01": "transformers turns whole heads by their position, where this model turns half of each",
    "phimoe": "llama.cpp computes its norms and its router in another way than the model's own code",
}
TABLE = plain.TABLE | shared.TABLE | hybrid.TABLE | delta.TABLE
