"""Stage 1 from the command line: what it writes, what it skips, what it refuses and how."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeprune.metadata import Sums
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


def reap(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "reap.py"), "--output-path", str(output), "--device", "cpu", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REAP_")}
    return subprocess.run(
        command, cwd=output, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("reap")
    model = tiny.make("glm4_moe", folder / "model")
    tiny.tokenizer(model)
    rows = [{"domain": "ab"[i % 2], "text": f"{i} words and numbers {i * 7} "} for i in range(12)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return model, data


@pytest.fixture(scope="module")
def first(inputs, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    output = tmp_path_factory.mktemp("first")
    return output, reap(output, "--model-path", str(inputs[0]), "--calibration-path", str(inputs[1]))


def test_a_folder_that_cannot_take_the_result_is_refused_before_the_work(inputs, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    taken = os.open(tmp_path / "taken", os.O_RDONLY)
    fcntl.flock(taken, fcntl.LOCK_EX)
    for name, message in {"file/inside": "Not a directory", "taken": "another run is writing"}.items():
        done = reap(tmp_path, "--model-path", str(inputs[0]), "--output-path", name)
        assert (done.returncode, len(done.stderr.splitlines())) == (4, 1), done.stderr
        assert message in done.stderr
    os.close(taken)
    done = reap(tmp_path, "--model-path", str(inputs[0]), "--output-path", str(inputs[0] / "results"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "choose another folder" in done.stderr
    assert not (inputs[0] / "results").exists()


def test_the_result_says_everything(first):
    output, done = first
    assert done.returncode == 0, done.stderr
    path = output / "reap_metadata.json"
    assert done.stdout == f"{path}\n"
    data = json.loads(path.read_text())
    assert data["kind"] == "reap_metadata"
    assert data["inputs"]["calibration"]["samples"] == 12
    assert data["inputs"]["model"]["model_type"] == "glm4_moe"
    sums = Sums.from_json(data["scores"])
    assert (sums.mode, sums.domains) == ("routed", ("a", "b"))
    assert [block.block for block in sums.blocks] == ["model.layers.1", "model.layers.2"]
    tokens = data["inputs"]["calibration"]["tokens"]
    for block in sums.blocks:
        assert block.tokens_D.sum() == tokens
        assert block.values["count"].sum() == 2 * tokens
        assert block.slices["count"].sum(axis=1).tolist() == block.values["count"].tolist()
    assert {len(ids) for ids in data["plan"]["keep"].values()} == {4}
    assert data["timing"]["scoring_s"] > 0
    assert not (output / "reap_state").exists()


def test_a_second_run_skips_without_torch(first, inputs):
    output, _ = first
    before = (output / "reap_metadata.json").stat().st_mtime_ns
    code = f"import sys; sys.argv[1:] = {['--model-path', str(inputs[0]), '--calibration-path', str(inputs[1])]!r}\n"
    code += f"sys.argv += ['--output-path', {str(output)!r}, '--device', 'cpu']; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "import reap; reap.main(sys.argv[1:]); assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=output, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is current" in done.stderr
    assert (output / "reap_metadata.json").stat().st_mtime_ns == before


def test_other_calibration_is_scored_again(inputs, tmp_path):
    first = reap(tmp_path, "--model-path", str(inputs[0]), "--calibration-path", str(inputs[1]))
    again = reap(tmp_path, "--model-path", str(inputs[0]), "--calibration-path", str(inputs[1]), "--max-samples", "4")
    assert (first.returncode, again.returncode) == (0, 0)
    assert "is current" not in again.stderr
    assert json.loads((tmp_path / "reap_metadata.json").read_text())["inputs"]["calibration"]["samples"] == 4


def damaged(source: Path, folder: Path, **config: object) -> Path:
    shutil.copytree(source, folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | config))
    return folder


def refusal(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_no_tokenizer_is_refused(inputs, tmp_path):
    model = damaged(inputs[0], tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "tokenizer" in refusal(reap(tmp_path, "--model-path", str(model)), 3)


def test_a_template_that_refuses_most_samples_is_refused(inputs, tmp_path):
    model = damaged(inputs[0], tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    said = refusal(reap(tmp_path, "--model-path", str(model)), 3)  # the built-in set is mostly chats
    assert "the chat template refused 347 of 421 samples" in said


def test_a_dense_model_is_refused(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert "without experts" in refusal(reap(tmp_path, "--model-path", str(tmp_path / "dense")), 3)


def test_a_model_that_transformers_does_not_know_is_refused(inputs, tmp_path):
    model = damaged(inputs[0], tmp_path / "model", model_type="never_heard_of", architectures=["NeverHeardOf"])
    line = refusal(reap(tmp_path, "--model-path", str(model), "--calibration-path", str(inputs[1])), 3)
    assert "transformers" in line


def test_a_missing_device_is_refused(inputs, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    arguments = ("--model-path", str(inputs[0]), "--calibration-path", str(inputs[1]), "--device", "cuda")
    assert "REAP_DEVICE" in refusal(reap(tmp_path, *arguments), 4)
