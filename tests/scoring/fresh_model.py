"""A family that transformers does not know: its checkpoint brings this file. Written as such files are.

Two ways to run experts that many of them share: a loop over experts that picks their tokens, and tokens sorted by
expert and put back, with the gates behind. A third one is no mixture as supposed.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class FreshConfig(PretrainedConfig):
    model_type = "fresh"

    def __init__(
        self,
        vocab_size=264,
        hidden_size=32,
        num_hidden_layers=3,
        num_experts=8,
        num_experts_per_tok=2,
        width=16,
        style="loop",
        **kwargs,
    ):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.width, self.style = width, style
        super().__init__(**kwargs)


class FreshMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.width, bias=False)
        self.down_proj = nn.Linear(config.width, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class FreshBlock(nn.Module):
    scale = 1.5

    def __init__(self, config):
        super().__init__()
        self.top_k, self.style = config.num_experts_per_tok, config.style
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([FreshMLP(config) for _ in range(config.num_experts)])
        self.shared_expert = FreshMLP(config)

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        scores = self.gate(x).softmax(-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        found = {"loop": self.loop, "sorted": self.sorted, "products": self.products}[self.style](x, chosen, weights)
        return (found * self.scale + self.shared_expert(x)).view_as(hidden_states)

    def loop(self, x, chosen, weights):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == number)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, place, None])
        return out

    @torch.no_grad()
    def sorted(self, x, chosen, weights):
        order = chosen.view(-1).argsort(descending=True)
        parts, start = [], 0
        for number in reversed(range(len(self.experts))):
            end = start + int((chosen == number).sum())
            if end > start:
                parts.append(self.experts[number](x[order[start:end] // self.top_k]))
            start = end
        out = torch.empty(len(order), x.shape[-1], dtype=x.dtype)
        out[order] = torch.cat(parts)
        return (out.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)

    def products(self, x, chosen, weights):
        return self.loop(x, chosen, weights) ** 2


class FreshLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp = FreshBlock(config)

    def forward(self, hidden_states):
        steps = torch.arange(1, hidden_states.shape[1] + 1).view(1, -1, 1)
        hidden_states = hidden_states + self.mix(hidden_states.cumsum(1) / steps)
        return hidden_states + self.mlp(hidden_states / hidden_states.norm(dim=-1, keepdim=True))


class FreshForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FreshConfig
    _no_split_modules = ("FreshLayer",)

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([FreshLayer(config) for _ in range(config.num_hidden_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **_):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return CausalLMOutput(logits=self.head(hidden_states))
