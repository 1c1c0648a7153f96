"""Every family: the streamed forward is the model's own to the bit, and what the observer saw adds up to what it did.

The sum over a token's experts of gate times output, as the observer sees both, must be what their module puts out.
In mode full, the sums over all tokens and experts must be those of an oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Module

from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.scoring.adapters import attached, find_sites
from moeprune.scoring.calibration.batching import Batch
from moeprune.scoring.entrance import also_given, entrance
from moeprune.scoring.observer import Observer, Site
from moeprune.scoring.streaming import LayerStream
from tests import tiny
from tests.scoring import streamed
from tests.scoring.every_expert import Oracle

# What the experts' module puts out, as a sum over experts for each token.
ROUTED_SUM: dict[str, Callable[[Module, torch.Tensor], torch.Tensor]] = {
    "Llama4TextExperts": lambda module, out: out.view(module.num_experts, -1, out.shape[-1]).sum(0),
    "NllbMoeExperts": lambda module, out: out.reshape(-1, out.shape[-1]) / (1 - module.moe_token_dropout),
    "JetMoeMoE": lambda module, out: out.view(-1, out.shape[-1]) - module.bias,
}


class Adding(Observer):
    """An observer that also adds gate times output, token by token."""

    def outputs(self, site: Site, y_SH: torch.Tensor) -> torch.Tensor:
        if site.all_tokens is not None:
            return super().outputs(site, y_SH)
        assert site.slots is not None
        sums_TH = torch.zeros(len(self._bucket_T), y_SH.shape[-1], dtype=torch.float64)
        gate_S = site.slots.gate_S / site.factor
        self.sums_TH = sums_TH.index_add_(0, site.slots.token_S, y_SH.double() * gate_S.unsqueeze(-1))
        return super().outputs(site, y_SH)


def forwards(data: list[Batch]) -> list[Callable[[Module], torch.Tensor]]:
    def one(batch: Batch) -> Callable[[Module], torch.Tensor]:
        return lambda model: logits(entrance(model)(**batch.inputs, **also_given(model, batch.inputs), use_cache=False))

    return [one(batch) for batch in data]


def logits(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamed_is_plain_and_observed_is_real(family: str, tmp_path) -> None:
    folder, data = streamed.checkpoint(family), streamed.batches(count=2, length=10)
    opened = open_checkpoint(folder)
    stream = LayerStream(opened, streamed.settings(tmp_path))
    observer = Adding(stream, data, streamed.DOMAINS, "full")
    blocks = understand(opened).blocks
    find_sites(observer, blocks)
    assert {site.block.name for site in observer.sites} == {block.name for block in blocks if block.role != "mtp"}
    checked = watch(observer)
    runs = forwards(data)
    with attached(observer):
        handles = [hook() for hook in checked.hooks]
        found = stream.run(runs, watchers=(observer,))
        for handle in handles:
            handle.remove()
    model = streamed.plain(folder)
    oracle = Oracle(family, model, observer)
    with torch.no_grad():
        for result, run, batch in zip(found, runs, data, strict=True):
            with oracle.watching():
                assert torch.equal(result, run(model))
            oracle.add(batch)
    for block in observer.result().blocks:
        assert block.values["count"].sum() > 0
        assert block.tokens_D.tolist() == [20, 15] or block.block.endswith(".vision")
        np.testing.assert_allclose(block.values["full_sum"], oracle.sums[block.block], rtol=1e-4, err_msg=block.block)
    assert checked.paths >= {site.path for site in observer.sites if site.block.role == "trunk"} or family == "jetmoe"


class Checked:
    def __init__(self) -> None:
        self.hooks: list[Callable[[], Any]] = []
        self.paths: set[str] = set()


def watch(observer: Adding) -> Checked:
    """Compare at every site, after the observer's own hooks have run."""
    checked = Checked()
    for site in observer.sites:
        module = observer.stream.model.get_submodule(site.path)
        if type(module).__name__ == "JetMoeMoA":
            continue

        def compare(module: Module, _args: Any, output: torch.Tensor, site: Site = site) -> None:
            if site.all_tokens is not None:  # mode full runs every expert
                return
            read = ROUTED_SUM.get(type(module).__name__, lambda _module, out: out.reshape(-1, out.shape[-1]))
            routed = read(module, output).double()
            if type(module).__name__ == "LongcatFlashExperts":  # identity experts add the token itself
                routed = torch.where(observer.sums_TH.abs().sum(-1, keepdim=True) > 0, observer.sums_TH, 0)
            scale = max(1.0, float(routed.abs().max()))
            torch.testing.assert_close(observer.sums_TH, routed, rtol=1e-4, atol=2e-5 * scale)
            checked.paths.add(site.path)

        checked.hooks.append(lambda module=module, compare=compare: module.register_forward_hook(compare))
    return checked
