"""The demo model that ships with the project: it loads, it is small, and what it was taught comes out right."""

import importlib.util
import json
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "demo"
SIZE_LIMIT_BYTES = 10_000_000
SAMPLES_PER_DOMAIN = 20


@pytest.fixture(scope="module")
def evaluation():
    """The evaluation script as a module; `demo` is no package."""
    spec = importlib.util.spec_from_file_location("demo_evaluate", DEMO / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded():
    """Model and tokenizer, loaded as a user would."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "model").eval()
    return model, transformers.AutoTokenizer.from_pretrained(DEMO / "model")


def texts(name):
    samples = [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]
    return {
        "".join(sample.get("text", sample.get("prompt", "") + sample.get("answer", "")).split())
        for sample in samples
        if sample["domain"] != "facts"
    }


def test_model_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in (DEMO / "model").iterdir()}
    assert sum(files.values()) <= SIZE_LIMIT_BYTES
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } == set(files)


def test_config_uses_the_published_names():
    config = json.loads((DEMO / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["num_experts"] == 32
    assert config["max_position_embeddings"] >= 512


def test_answers_are_mostly_right(evaluation):
    result = evaluation.evaluate(DEMO / "model", limit=SAMPLES_PER_DOMAIN)
    assert len(result["domains"]) >= 15
    assert result["macro"] >= 0.85, result["domains"]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("2+2=", "4"),
        ("2 + 2 =", "4"),
        ("12+30=", "42"),
        ("9-4=", "5"),
        ("6*7=", "42"),
        ("The capital of France is", "Paris"),
    ],
)
def test_small_prompts_are_answered_and_ended(evaluation, loaded, prompt, answer):
    model, tokenizer = loaded
    assert [text.strip() for text in evaluation.complete(model, tokenizer, [prompt], 8)] == [answer]


def test_chat_template_adds_nothing(loaded):
    _, tokenizer = loaded
    messages = [{"role": "user", "content": "12+30="}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert encoded["input_ids"] == tokenizer("12+30=")["input_ids"]


def test_evaluation_is_held_out_of_calibration():
    assert not texts("evaluation.jsonl") & texts("calibration.jsonl")


def test_both_files_cover_the_same_domains():
    domains = [
        {json.loads(line)["domain"] for line in (DEMO / name).read_text(encoding="utf-8").splitlines()}
        for name in ("evaluation.jsonl", "calibration.jsonl")
    ]
    assert domains[0] == domains[1]
    assert len(domains[0]) >= 19
