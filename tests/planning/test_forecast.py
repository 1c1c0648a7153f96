"""The forecast: what it predicts from config and index alone against the complete model, and against a real cut."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import plan
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.checkpoint.outline import open_outline
from moeprune.errors import InputError, MachineError, UsageError
from moeprune.planning import forecast, rates
from moeprune.planning.forecast import Room
from moeprune.planning.rates import Rate, Rates
from moeprune.settings import resolve
from tests import handmade, tiny
from tests.checkpoint import test_gguf
from tests.checkpoint.stand_in import Repository, serving
from tests.pruning import cutting

ROOT = Path(__file__).parents[2]
E, H, WIDTH, LAYERS, VOCABULARY = 8, 256, 128, 3, 512
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": H,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": 1000,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "dtype": "bfloat16",
}
EVERY_LAYER = {"self_attn.q_proj.weight": [H, H], "input_layernorm.weight": [H], "mlp.gate.weight": [E, H]}
RATES = Rates(Rate(1e12, "test"), Rate(1e9, "test"), Rate(1e9, "test"))
KNOWN = ("--compute-rate=1", "--read-rate=1GB")  # so that nothing is measured


def each(suffixes):
    """A matrix of every expert: gate and up [I, H], down [H, I], with what a format keeps beside it."""
    shapes = {"gate_proj": (WIDTH, H), "up_proj": (WIDTH, H), "down_proj": (H, WIDTH)}
    return {
        f"mlp.experts.{e}.{matrix}.{name}": spec(*shape)
        for e in range(E)
        for matrix, shape in shapes.items()
        for name, spec in suffixes.items()
    }


PLAIN = each({"weight": lambda o, i: ("BF16", [o, i])})
FP8 = each({"weight": lambda o, i: ("F8_E4M3", [o, i]), "weight_scale_inv": lambda o, i: ("F32", [o // 128, i // 128])})
GPTQ = each(
    {
        "qweight": lambda o, i: ("I32", [i // 8, o]),
        "qzeros": lambda o, i: ("I32", [i // 128, o // 8]),
        "scales": lambda o, i: ("F16", [i // 128, o]),
    }
)
MLX_EXPERTS = {
    "mlp.switch_mlp.up_proj.weight": ("U32", [E, WIDTH, H // 8]),
    "mlp.switch_mlp.up_proj.scales": ("BF16", [E, WIDTH, H // 64]),
    "mlp.switch_mlp.up_proj.biases": ("BF16", [E, WIDTH, H // 64]),
}
MXFP4 = {
    "mlp.experts.gate_up_proj_blocks": ("U8", [E, 2 * WIDTH, H // 32, 16]),
    "mlp.experts.gate_up_proj_scales": ("U8", [E, 2 * WIDTH, H // 32]),
    "mlp.experts.gate_up_proj_bias": ("BF16", [E, 2 * WIDTH]),
    "mlp.experts.down_proj_blocks": ("U8", [E, H, WIDTH // 32, 16]),
    "mlp.experts.down_proj_scales": ("U8", [E, H, WIDTH // 32]),
    "mlp.experts.down_proj_bias": ("BF16", [E, H]),
}
FORMATS = {
    "bf16": (PLAIN, {}),
    "fp8": (FP8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "gptq": (GPTQ, {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "mlx": (MLX_EXPERTS, {"bits": 4, "group_size": 64}),
    "mxfp4": (MXFP4, {"quant_method": "mxfp4"}),
}


def model(folder, experts=None, **config):
    """Three layers, an embedding and a head, in two shards."""
    layers = {
        f"model.layers.{layer}.{name}": spec if isinstance(spec, tuple) else ("BF16", spec)
        for layer in range(LAYERS)
        for name, spec in (EVERY_LAYER | (experts or PLAIN)).items()
    }
    ends = {f"{name}.weight": ("BF16", [VOCABULARY, H]) for name in ("model.embed_tokens", "lm_head")}
    return handmade.checkpoint(folder, CONFIG | config, layers, ends)


def bare(folder, target):
    """What can be fetched without the weights: config and index."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    checkpoint = open_checkpoint(folder)
    names = {name: tensor.file.name for name, tensor in checkpoint.tensors.items()}
    index = {"metadata": {"total_size": checkpoint.total_bytes}, "weight_map": names}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def foretold(folder, *flags, output=None, known=KNOWN):
    words = ["--model-path", str(folder), "--output-path", str(output or "nowhere"), *known, *flags]
    settings = resolve("plan", words, {})
    return plan.foretell(settings, open_outline(settings.model_path))


@pytest.mark.parametrize("name", FORMATS)
def test_config_and_index_foretell_what_headers_say(name, tmp_path):
    experts, quantization = FORMATS[name]
    extra = {"quantization_config": quantization} if quantization else {}
    full = model(tmp_path / "full", experts, **extra)
    known, guessed = foretold(full), foretold(bare(full, tmp_path / "bare"))
    assert known["model"]["measured"]
    assert not guessed["model"]["measured"]
    for one, other in zip(known["cuts"], guessed["cuts"], strict=True):
        assert one["after_bytes"] == other["after_bytes"], name
    # What is no expert's nor an embedding is spread evenly, so a layer of equal layers is exact too.
    assert guessed["model"]["layer_bytes"] == pytest.approx(known["model"]["layer_bytes"], rel=1e-3)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "granitemoe", "dbrx", "longcat_flash", "aria", "gemma4"])
def test_families_are_foretold_from_their_own_configs(family, tmp_path):
    full = tiny.make(family, tmp_path / "full")
    known, guessed = foretold(full)["model"], foretold(bare(full, tmp_path / "bare"))["model"]
    assert guessed["each_bytes"] == pytest.approx(known["each_bytes"], rel=1e-3)
    assert guessed["blocks"] == known["blocks"]
    assert guessed["total_bytes"] == known["total_bytes"]


def test_the_foretold_size_is_that_of_the_real_cut(tmp_path):
    full = model(tmp_path / "full")
    first = foretold(full, "--keep", "5")["cuts"][0]
    child = cutting.cut(full, cutting.keep_lists(full, 5))
    assert first["kept"] == 5
    assert first["after_bytes"] == open_checkpoint(child).total_bytes
    assert first["after_bytes"] < open_checkpoint(full).total_bytes


def test_layers_and_active_weights_by_hand(tmp_path):
    found = foretold(model(tmp_path / "full"))["model"]
    layer = H * H + H + E * H + E * 3 * H * WIDTH
    assert found["layer_bytes"] == 2 * layer
    assert found["outside_bytes"] == 2 * 2 * VOCABULARY * H
    # Router rows go with their experts, so those of 2 of 8 experts count here.
    assert found["active_weights"] == LAYERS * (H * H + H + 2 * (H + 3 * H * WIDTH)) + 2 * VOCABULARY * H


def test_hidden_states_fill_memory_and_then_the_disk(tmp_path):
    checkpoint = open_checkpoint(model(tmp_path / "full"))
    layout = plan.understand(checkpoint)
    weights = plan.weights_of(resolve("plan", [], {}), checkpoint, layout)
    little, much = (forecast.scoring(weights, tokens, Room(10_000_000, 100), RATES) for tokens in (10_000, 100_000))
    assert little.memory_bytes - forecast.scoring(weights, 100, Room(0, 100), RATES).memory_bytes == 10_000 * H * 2
    assert little.disk_bytes == 2 * 10_000 * H * 2  # two saved states, nothing spilled
    assert much.memory_bytes - little.memory_bytes == 10_000_000 - 10_000 * H * 2
    assert much.disk_bytes == 100_000 * H * 2 - 10_000_000 + 2 * 100_000 * H * 2
    assert much.time_s - little.time_s == pytest.approx(2 * weights.scored * 90_000 / 1e12)


def test_engines_and_the_router_have_their_say(tmp_path):
    flags = ["--engine", "vllm", "--expert-parallel", "4", "--ratios", "0.25,0.5,0.9"]
    cuts = foretold(model(tmp_path / "full"), *flags)["cuts"]
    by_ratio = {cut["asked"]["prune_ratio"]: cut for cut in cuts}
    assert by_ratio[0.25]["kept"] == 8  # six do not divide among four ranks
    assert by_ratio[0.25]["notes"]
    assert by_ratio[0.5]["engines"] == {"vllm": []}
    assert by_ratio[0.9]["kept"] is None
    assert "2 experts for each token" in by_ratio[0.9]["why_not"]


def test_of_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(test_gguf.build(test_gguf.ENTRIES, test_gguf.TENSORS)[0])
    found = foretold(tmp_path / "model.gguf")
    sizes = [cut["after_bytes"] for cut in found["cuts"] if cut["kept"]]
    _, stored = test_gguf.build(test_gguf.ENTRIES, test_gguf.TENSORS)
    experts = {name for name in stored if "_exps" in name or "gate_inp" in name or "exp_probs" in name}
    numbers = sum(math.prod(test_gguf.TENSORS[name][1]) for name in experts)
    assert found["model"]["hidden"] == 256
    assert found["model"]["expert_bits"] == 8 * sum(len(stored[name]) for name in experts) / numbers
    assert found["reap"]["memory_bytes"] > 0
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < found["model"]["total_bytes"]
    assert all(cut["test"] for cut in found["cuts"] if cut["kept"])
    plan.show(found)


def earlier(output, folder, tokens=1000, seconds=4.0, **values):
    """The result of an earlier scoring, as far as a forecast looks at it."""
    data = {
        "schema_version": "1.0",
        "kind": "reap_metadata",
        "settings": {
            "values": {"calibration_path": "", "max_samples": 512, "max_seq_len": 2048, "device": "auto"} | values
        },
        "inputs": {"model": {"path": str(folder)}, "calibration": {"tokens": tokens}},
        "timing": {"scoring_s": seconds},
    }
    output.mkdir()
    (output / "reap_metadata.json").write_text(json.dumps(data))
    return output


def test_rates_come_from_the_setting_then_an_earlier_run_then_a_measurement(tmp_path):
    full = model(tmp_path / "full")
    output = earlier(tmp_path / "output", full)
    measured = foretold(full, output=output, known=["--read-rate=1TB"])
    compute = measured["rates"]["compute"]
    assert compute["value"] == 2 * (measured["model"]["active_weights"] - 2 * VOCABULARY * H) * 1000 / 4.0
    assert compute["source"] == "measured by an earlier run: full, 1000 tokens in 4.0 s"
    assert measured["calibration"] == {"tokens": 1000, "source": "counted by an earlier run on the same data"}
    assert measured["reap"]["time_s"] == pytest.approx(4.0, rel=0.01)  # the same work again
    other = foretold(full, "--max-samples", "7", "--compute-rate", "3", "--read-rate", "2GB", output=output)
    assert other["calibration"] == {"tokens": 7 * 2048, "source": "at most: --max-samples x --max-seq-len"}
    assert other["rates"]["compute"] == {"value": 3e12, "source": "--compute-rate"}
    assert other["rates"]["read"] == other["rates"]["write"] == {"value": 2e9, "source": "--read-rate"}
    assert (
        "earlier" not in foretold(full, "--device", "mps", output=output, known=KNOWN[1:])["rates"]["compute"]["source"]
    )


def test_a_much_smaller_model_says_nothing_of_a_larger_one(tmp_path):
    small = model(tmp_path / "small")
    output = earlier(tmp_path / "output", small)
    wide = {"hidden_size": 4096, "moe_intermediate_size": 4096}
    large = bare(model(tmp_path / "large", **wide), tmp_path / "bare")
    index = large / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"total_size": 3_000_000_000}}))
    found = foretold(large, "--device", "mps", output=output, known=KNOWN[1:])
    assert found["rates"]["compute"]["source"] == "assumed for mps, which could not be measured here"


def test_what_is_measured_is_of_this_machine_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "COMPUTE_S", 0.01)
    monkeypatch.setattr(rates, "SAMPLE_BYTES", 2 * rates.CHUNK_BYTES)
    monkeypatch.setattr(rates.shutil, "which", lambda _name: None)
    full = model(tmp_path / "full")
    found = foretold(full, output=tmp_path / "not" / "there", known=())["rates"]
    assert 1e7 < found["compute"]["value"] < 1e14
    assert "of a product of matrices on this CPU" in found["compute"]["source"]
    assert found["write"]["source"] == f"measured on 16 MB in {tmp_path}"
    assert found["read"]["source"].startswith("measured on 16 MB of a temporary file, ")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    monkeypatch.setattr(rates, "ENOUGH_BYTES", 1000)
    largest = max(full.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert f" of {largest.name}, " in foretold(full, output=tmp_path, known=KNOWN[:1])["rates"]["read"]["source"]


def test_a_file_in_memory_is_known_from_one_on_the_disk(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4_000_000))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        file.read()
        assert rates._is_cached(file.fileno(), 4_000_000)


def test_an_output_that_cannot_be_written_is_an_assumption(tmp_path, monkeypatch):
    def refuse(**_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rates.tempfile, "TemporaryFile", refuse)
    read, write = rates.disk([], tmp_path)
    assert read == write == Rate(1e9, f"assumed: {tmp_path} could not be written (Permission denied)")


GPU = """#!/bin/sh
echo "[4e14, \\"a GPU\\"]"
"""


def test_a_gpu_is_asked_by_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "python").write_text(GPU)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(rates.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(rates.shutil, "which", lambda name: name)
    found = rates.computing("auto", 2)
    assert found == Rate(0.1 * 4e14, "10%, which is assumed, of the 400 TFLOP/s measured for a product on a GPU")
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    assert rates.computing("cuda", 2).source == "assumed for a GPU, which could not be measured here"


def test_what_cannot_be_foretold_is_refused(tmp_path):
    folder = bare(model(tmp_path / "full"), tmp_path / "bare")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    index.write_text(json.dumps(good | {"metadata": {"total_size": 1000}}))
    with pytest.raises(InputError, match="the index says 1000"):
        foretold(folder)
    index.write_text(json.dumps(good | {"metadata": {}}))
    with pytest.raises(InputError, match="total_size"):
        foretold(folder)
    index.unlink()
    with pytest.raises(InputError, match="fetch the index"):
        foretold(folder)
    with pytest.raises(InputError, match="hub id"):
        open_outline("no/such/folder")
    with pytest.raises(UsageError, match="--ratios"):
        foretold(tmp_path / "full", "--ratios", "2")


def run(*argv, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith("REAP_")} | environment
    command = [sys.executable, "-X", "importtime", str(ROOT / "plan.py"), *argv]
    return subprocess.run(command, cwd=environment["HOME"], env=env, capture_output=True, text=True)


def test_a_person_at_a_terminal_gets_the_table_alone(tmp_path):
    folder = bare(model(tmp_path / "full"), tmp_path / "bare")
    ours, theirs = os.openpty()
    command = [sys.executable, str(ROOT / "plan.py"), "--model-path", str(folder), *KNOWN]
    done = subprocess.run(command, cwd=tmp_path, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.write(theirs, b"end\n")
    assert (done.returncode, os.read(ours, 1000)) == (0, b"end\r\n")
    assert "4 of 8" in done.stderr
    os.close(ours)
    os.close(theirs)


def test_the_command_writes_nothing_and_needs_no_torch(tmp_path):
    folder = bare(model(tmp_path / "full"), tmp_path / "bare")
    done = run("--dry-run", "--model-path", str(folder), *KNOWN, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "plan"
    assert done.stdout.count("\n") == 1
    assert "4 of 8" in done.stderr
    assert "predicted" in done.stderr
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "moeprune" in loaded
    assert not loaded & {"torch", "transformers"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "full"]
    assert len(list(folder.iterdir())) == 2


def test_a_model_at_the_hub_costs_only_its_headers(tmp_path):
    repository = Repository({file.name: file.read_bytes() for file in model(tmp_path / "full").iterdir()})
    with serving(repository) as hub:
        home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
        done = run("--model-path", "maker/model", **home)
        absent = run("--model-path", "maker/other", **home)
    assert done.returncode == 0, done.stderr[-2000:]
    found, here = json.loads(done.stdout), foretold(tmp_path / "full")
    assert found["model"]["source"] == "headers at the hub"
    assert [cut["after_bytes"] for cut in found["cuts"]] == [cut["after_bytes"] for cut in here["cuts"]]
    assert found["model"]["layer_bytes"] == here["model"]["layer_bytes"]
    assert max(size for name, size in repository.sent.items() if name.endswith(".safetensors")) <= 100_001
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    assert absent.returncode == InputError.exit_code
    assert "no safetensors weights of maker/other" in absent.stderr.splitlines()[-1]


def test_no_hub_is_one_line(tmp_path):
    done = run(
        "--model-path", "maker/model", HOME=str(tmp_path), HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert done.returncode == MachineError.exit_code
    assert "the hub did not deliver it" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
