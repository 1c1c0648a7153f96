"""Scores of a streamed run against a loop over tokens in float64, written from the formulas alone.

The oracle takes from the plain model what goes into a block and what its router decides, and computes each chosen
expert's output by itself, from the expert's own slice of the weights.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Module
from torch.nn.functional import silu

from moeprune.scoring.calibration.batching import Batch
from tests.scoring import streamed

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe")


def expert_output(experts: Module, expert: int, x_H: torch.Tensor) -> torch.Tensor:
    """One expert on one token, in float64."""
    up, down = experts.gate_up_proj[expert].double(), experts.down_proj[expert].double()
    if hasattr(experts, "gate_up_proj_bias"):  # gpt_oss: transposed, interleaved, clamped, with biases
        h = x_H @ up + experts.gate_up_proj_bias[expert].double()
        gate, value = h[0::2].clamp(max=experts.limit), h[1::2].clamp(-experts.limit, experts.limit)
        inner = (value + 1) * gate * torch.sigmoid(gate * experts.alpha)
        return inner @ down + experts.down_proj_bias[expert].double()
    gate, value = (up @ x_H).chunk(2)
    return down @ (silu(gate) * value)


def blocks(model: torch.nn.Module, ending: str) -> dict[str, Module]:
    """Layer name -> MoE block."""
    return {n.rpartition(".")[0]: m for n, m in model.named_modules() if hasattr(m, "experts") and n.endswith(ending)}


def oracle(
    folder: Any, data: list[Any], ending: str = ".mlp", reach: list[Any] | None = None
) -> dict[str, dict[str, Any]]:
    """block -> statistic -> [D, E], the long way round. `reach`: the batches with only the tokens that get there."""
    model = streamed.plain(folder)
    seen: dict[str, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
    for name, block in blocks(model, ending).items():
        router = block.gate if hasattr(block, "gate") else block.router

        def look(_module: Module, args: Any, output: Any, name: str = name) -> None:
            seen[name].append((args[0].reshape(-1, args[0].shape[-1]), *output))

        router.register_forward_hook(look)
    found: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for batch in data:
            model(**batch.inputs, use_cache=False)
        for name, block in blocks(model, ending).items():
            found[name] = add_up(block.experts, seen[name], reach or data)
    return found


def add_up(experts: Module, seen: list[tuple[torch.Tensor, ...]], data: list[Any]) -> dict[str, Any]:
    number = len(experts.down_proj)
    names = ("count", "gate_sum", "gate_sq_sum", "norm_sum", "norm_sq_sum", "gate_norm_sum", "gate_norm_sq_sum")
    sums = {name: np.zeros((2, number)) for name in (*names, "max_abs", "special_sum", "full_sum", "router_sum")}
    vectors: dict[tuple[int, int], torch.Tensor] = {}
    slices = np.zeros((2, 4, number))
    tokens = np.zeros(2)
    for batch, (x_TH, logits_TE, gate_TK, index_TK) in zip(data, seen, strict=True):
        domains, parts = batch.domain_BT.reshape(-1).tolist(), batch.slice_BT.reshape(-1).tolist()
        for t, d in enumerate(domains):
            x_H = x_TH[t].double()
            if d < 0:
                if d != -1:  # a special token
                    add_special(sums, -2 - d, experts, x_H, gate_TK[t], index_TK[t])
                continue
            tokens[d] += 1
            for gate, e in zip(gate_TK[t].double().tolist(), index_TK[t].tolist(), strict=True):
                f_H = expert_output(experts, e, x_H)
                norm = float(f_H.norm())
                for name, value in zip(
                    names, (1, gate, gate**2, norm, norm**2, gate * norm, (gate * norm) ** 2), strict=True
                ):
                    sums[name][d, e] += value
                sums["max_abs"][d, e] = max(sums["max_abs"][d, e], float(f_H.abs().max()))
                slices[d, parts[t], e] += gate * norm
                vectors[d, e] = vectors.get((d, e), 0) + f_H
            score_E = scores(experts, logits_TE[t].double())
            for e in range(number):
                sums["full_sum"][d, e] += float(score_E[e] * expert_output(experts, e, x_H).norm())
                sums["router_sum"][d, e] += float(score_E[e] * x_H.norm())
    gram = np.zeros((number, 2, 2))
    for (d, e), one in vectors.items():
        for (c, f), other in vectors.items():
            if e == f:
                gram[e, d, c] = float(one @ other)
    return sums | {"slices": slices, "gram": gram, "tokens": tokens}


def add_special(
    sums: dict[str, Any], d: int, experts: Module, x_H: torch.Tensor, gate_K: torch.Tensor, index_K: torch.Tensor
) -> None:
    """Of a token that is left out, the largest components and a sum of its own are kept."""
    for gate, e in zip(gate_K.double().tolist(), index_K.tolist(), strict=True):
        f_H = expert_output(experts, e, x_H)
        sums["max_abs"][d, e] = max(sums["max_abs"][d, e], float(f_H.abs().max()))
        sums["special_sum"][d, e] += gate * float(f_H.norm())


def scores(experts: Module, logits_E: torch.Tensor) -> torch.Tensor:
    """Router probabilities: sigmoid routers divide by the sum over all experts."""
    name = type(experts).__name__
    if name.startswith(("Deepseek", "Glm")):
        return torch.sigmoid(logits_E) / torch.sigmoid(logits_E).sum()
    return logits_E if bool((logits_E >= 0).all()) and abs(float(logits_E.sum()) - 1) < 1e-3 else logits_E.softmax(-1)


@pytest.mark.parametrize(("family", "special"), [*((name, False) for name in FAMILIES), ("qwen3_moe", True)])
def test_every_statistic_is_that_of_a_loop_over_tokens(family, special, tmp_path):
    data = with_special(streamed.batches()) if special else streamed.batches()
    folder = streamed.checkpoint(family)
    expected = oracle(folder, data)
    runs = {mode: streamed.score(folder, data, tmp_path, mode) for mode in ("routed", "full", "router")}
    routed = runs["routed"]
    assert [block.block for block in routed.blocks] == list(expected)
    for block in routed.blocks:
        want = expected[block.block]
        np.testing.assert_array_equal(block.tokens_D, want["tokens"])
        np.testing.assert_array_equal(block.values["count"], want["count"])
        assert set(block.values) == {name for name in want if name.endswith("sum")} - {"full_sum", "router_sum"} | {
            "count",
            "max_abs",
            "special_sum",
        }
        for name, array in block.values.items():
            np.testing.assert_allclose(array, want[name], rtol=2e-5, atol=1e-7, err_msg=f"{block.block} {name}")
        assert bool(block.values["special_sum"].any()) is special
        np.testing.assert_allclose(block.slices["gate_norm_sum"], want["slices"], rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(block.gram_EDD, want["gram"], rtol=1e-4, atol=1e-5)
    for mode, statistic in (("full", "full_sum"), ("router", "router_sum")):
        for block in runs[mode].blocks:
            want = expected[block.block]
            np.testing.assert_allclose(block.values[statistic], want[statistic], rtol=2e-5, err_msg=block.block)
            np.testing.assert_array_equal(block.values["count"], want["count"])
    assert "norm_sum" not in runs["router"].blocks[0].values
    for a, b in zip(routed.blocks, runs["full"].blocks, strict=True):
        np.testing.assert_array_equal(a.values["gate_norm_sum"], b.values["gate_norm_sum"])


def with_special(data: list[Batch]) -> list[Batch]:
    """The same batches, in which the first token of each row and every fifth are special and left out."""
    for batch in data:
        chosen_BT = (torch.arange(batch.domain_BT.shape[1]) % 5 == 0) & (batch.domain_BT >= 0)
        batch.domain_BT[chosen_BT] = -2 - batch.domain_BT[chosen_BT]
    return data


def test_a_special_token_enters_the_largest_activations_and_nothing_else(tmp_path):
    """As if its row had counted it, but for the maxima: what super experts are known by."""
    folder = streamed.checkpoint("qwen3_moe")
    every, without = (streamed.score(folder, make(streamed.batches()), tmp_path) for make in (list, with_special))
    for a, b in zip(every.blocks, without.blocks, strict=True):
        np.testing.assert_array_equal(a.values["max_abs"], b.values["max_abs"])
        np.testing.assert_allclose(
            a.values["gate_norm_sum"], b.values["gate_norm_sum"] + b.values["special_sum"], rtol=1e-12
        )
        assert (a.tokens_D > b.tokens_D).all()
        assert not a.values["special_sum"].any()


def test_padding_is_not_counted(tmp_path):
    """The same rows with more padding behind them give the same counts, and norms to float noise."""
    folder = streamed.checkpoint("qwen3_moe")
    short, long = streamed.batches(), streamed.batches()
    for index, batch in enumerate(long):
        inputs = {name: torch.nn.functional.pad(tensor, (0, 9)) for name, tensor in batch.inputs.items()}
        domain_BT = torch.nn.functional.pad(batch.domain_BT, (0, 9), value=-1)
        long[index] = type(batch)(inputs, domain_BT, torch.nn.functional.pad(batch.slice_BT, (0, 9)))
    one, other = streamed.score(folder, short, tmp_path), streamed.score(folder, long, tmp_path)
    for a, b in zip(one.blocks, other.blocks, strict=True):
        np.testing.assert_array_equal(a.values["count"], b.values["count"])
        np.testing.assert_array_equal(a.tokens_D, b.tokens_D)
        np.testing.assert_allclose(a.values["gate_norm_sum"], b.values["gate_norm_sum"], rtol=1e-4)
        np.testing.assert_allclose(a.values["max_abs"], b.values["max_abs"], rtol=1e-4)
