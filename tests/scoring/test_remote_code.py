"""A checkpoint that brings the code of its own family: scored in every mode, cut, loaded; never run unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import silu

import prune_model
import reap
from moeprune import metadata
from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import InputError
from moeprune.scoring.adapters import attached, find_sites
from moeprune.scoring.asking import Foreign
from moeprune.scoring.observer import Observer
from moeprune.scoring.run import forward
from moeprune.scoring.streaming import LayerStream
from tests import tiny
from tests.pruning import cutting
from tests.scoring import fresh_model, streamed

AUTO_MAP = {"AutoConfig": "fresh_model.FreshConfig", "AutoModelForCausalLM": "fresh_model.FreshForCausalLM"}


def checkpoint(folder: Path, style: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model of the family with its code beside it."""
    torch.manual_seed(0)
    model = fresh_model.FreshForCausalLM(fresh_model.FreshConfig(style=style))
    for parameter in model.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    config = tiny.read_config(folder) | {"auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(fresh_model.__file__, folder / "fresh_model.py")
    tiny.tokenizer(folder)
    return folder


def plain(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def score(folder: Path, data: list, tmp_path: Path, mode: str = "routed") -> metadata.Sums:
    opened = open_checkpoint(folder)
    stream = LayerStream(opened, streamed.settings(tmp_path, trust_remote_code=True))
    observer = Observer(stream, data, streamed.DOMAINS, mode)
    find_sites(observer, understand(opened).blocks)
    with attached(observer):
        stream.run([forward(batch) for batch in data], watchers=(observer,), until=observer.sites[-1].layer)
    return observer.result()


def oracle(folder: Path, data: list) -> dict[str, dict[str, np.ndarray]]:
    """Layer -> statistic -> [D, E], token by token in float64, from the weights alone."""
    model, found = plain(folder), {}
    for name, block in model.named_modules():
        if name.endswith(".mlp"):
            found[name.removesuffix(".mlp")] = sums = {
                key: np.zeros((2, 8))
                for key in ("count", "gate_sum", "norm_sum", "gate_norm_sum", "full_sum", "router_sum")
            }
            seen = []
            handle = block.register_forward_pre_hook(
                lambda _module, args, seen=seen: seen.append(args[0].flatten(0, 1))
            )
            with torch.no_grad():
                for batch in data:
                    model(batch.inputs["input_ids"])
                    for domain, x in zip(batch.domain_BT.reshape(-1).tolist(), seen.pop().double(), strict=True):
                        if domain >= 0:
                            add(block, x, {key: values[domain] for key, values in sums.items()})
            handle.remove()
    return found


def add(block: fresh_model.FreshBlock, x: torch.Tensor, sums: dict[str, np.ndarray]) -> None:
    scores = (block.gate.weight.double() @ x).softmax(0)
    top = scores.topk(2)
    gates = dict(zip(top.indices.tolist(), (top.values / top.values.sum() * 1.5).tolist(), strict=True))
    for number, expert in enumerate(block.experts):
        up, gate, down = (getattr(expert, f"{p}_proj").weight.double() for p in ("up", "gate", "down"))
        norm = float((down @ (silu(gate @ x) * (up @ x))).norm())
        sums["full_sum"][number] += float(scores[number]) * norm
        sums["router_sum"][number] += float(scores[number] * x.norm())
        if number in gates:
            sums["count"][number] += 1
            sums["gate_sum"][number] += gates[number]
            sums["norm_sum"][number] += norm
            sums["gate_norm_sum"][number] += gates[number] * norm


@pytest.mark.parametrize("style", ["loop", "sorted"])
def test_scores_are_those_of_a_loop_over_tokens(style, tmp_path):
    """The blocks scale behind the experts; what they really multiply with counts."""
    folder, data = checkpoint(tmp_path / "model", style), streamed.batches()
    expected = oracle(folder, data)
    for mode in ("routed", "full", "router"):
        for block in score(folder, data, tmp_path, mode).blocks:
            for name, want in expected[block.block].items():
                if name in block.values:
                    np.testing.assert_allclose(block.values[name], want, rtol=2e-5, err_msg=f"{mode} {name}")
            assert {"full": "full_sum", "router": "router_sum"}.get(mode, "count") in block.values


def test_gates_survive_bfloat16(tmp_path):
    """Asked for with a signal far above what else the block adds; they are as exact as the type."""
    folder, data = checkpoint(tmp_path / "model", "loop", torch.bfloat16), streamed.batches()
    opened = open_checkpoint(folder)
    settings = streamed.settings(tmp_path, trust_remote_code=True)
    stream = LayerStream(opened, type(settings)(**vars(settings) | {"dtype": "bfloat16"}))
    observer = Observer(stream, data, streamed.DOMAINS)
    find_sites(observer, understand(opened).blocks)
    with attached(observer):
        stream.run([forward(batch) for batch in data], watchers=(observer,), until=observer.sites[-1].layer)
    for block in observer.result().blocks:
        per_token = block.values["gate_sum"].sum(1) / block.tokens_D
        np.testing.assert_allclose(per_token, 1.5, rtol=5e-3)
        assert block.values["count"].sum() == 2 * block.tokens_D.sum()


def test_a_block_that_is_no_sum_of_experts_is_refused(tmp_path):
    with pytest.raises(Foreign, match=r"layers\.0\.mlp does not put out the sum .* needs an adapter"):
        score(checkpoint(tmp_path / "model", "products"), streamed.batches(), tmp_path)


@pytest.mark.parametrize("setting", [[], ["--trust-remote-code", "false"]])
def test_code_is_not_run_unasked(setting, tmp_path):
    folder = checkpoint(tmp_path / "model", "loop")
    (folder / "fresh_model.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(InputError, match=r"brings its own code: --trust-remote-code runs it"):
        reap.main(["--model-path", str(folder), "--output-path", str(tmp_path / "output"), *setting])


def test_a_family_without_its_code_can_still_be_cut(tmp_path):
    folder = checkpoint(tmp_path / "model", "loop")
    config = tiny.read_config(folder)
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"fetch the code that the model came with .* --plan"):
        reap.main(["--model-path", str(folder), "--output-path", str(tmp_path / "output"), "--trust-remote-code"])
    keep = cutting.keep_lists(folder, 4)
    assert set(understand(open_checkpoint(cutting.cut(folder, keep))).by_name) == set(keep)


def test_from_scores_to_a_smaller_model(tmp_path):
    folder, output = checkpoint(tmp_path / "model", "loop"), tmp_path / "output"
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} tells of {i * 7 % 13} things and {i} more." for i in range(12)))
    flags = ["--model-path", str(folder), "--output-path", str(output)]
    reap.main(
        [*flags, "--device", "cpu", "--calibration-path", str(text), "--max-seq-len", "64", "--trust-remote-code"]
    )
    prune_model.main([*flags, "--prune-ratio", "0.5", "--pruned-output-path", str(tmp_path / "cut")])
    keep = metadata.read_json(output / "reap_metadata.json", "scores")
    assert len(keep["scores"]["blocks"]) == 3
    child, parent = plain(tmp_path / "cut"), plain(folder)
    assert {len(layer.mlp.experts) for layer in child.layers} == {4}
    kept = [
        [next(n for n in range(8) if torch.equal(layer.mlp.gate.weight[i], old.mlp.gate.weight[n])) for i in range(4)]
        for layer, old in zip(child.layers, parent.layers, strict=True)
    ]
    ids = torch.randint(0, 250, (2, 16))
    for layer, ids_kept in zip(parent.layers, kept, strict=True):
        dropped = torch.ones(8, dtype=torch.bool)
        dropped[ids_kept] = False
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out, d=dropped: out.masked_fill(d, float("-inf")))
    with torch.no_grad():
        torch.testing.assert_close(child(ids).logits, parent(ids).logits)
