"""Every setting once. A flag beats the environment, which beats `.env`, which beats the default; the origin is kept.

To add a setting, add a field to `Settings`; what its text may be is a parser in `values.py`. Flags, environment names
and `--help` follow from it; `.env.example`, the compose file and the README table are tested against it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from moeprune.envfile import read_dotenv
from moeprune.errors import UsageError
from moeprune.values import amount, natural, number, one_of, positive, ratio, ratios, switch, whole

STAGES = {
    "plan": "Say what each step would take and what its result would be, also of a model that is not downloaded.",
    "reap": "Score the experts of a model on calibration data.",
    "prune": "Write the smaller model from the scores.",
    "preview": "Show what each cut would lose, before anything is written.",
    "test": "Generate with the pruned model and judge it against its parent.",
    "combine": "Add up the scores of several runs on the same model.",
    "serve": "Serve the pruned model or its parent with vLLM: serve pruned|parent [FLAGS] [-- ARGS OF VLLM].",
    "batch": "Send many prompts to an OpenAI-compatible server and keep every answer.",
}


def setting(
    default: Any, parse: Callable[[str], Any], stages: str, text: str, env: str = "", secret: bool = False
) -> Any:
    """A field of `Settings`: default, parser, the stages that have the flag, one line of help."""
    metadata = {"parse": parse, "stages": frozenset(stages.split()), "help": text, "env": env, "secret": secret}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The resolved settings of one run."""

    model_path: str = setting(
        "",
        str,
        "plan reap prune preview test serve",
        "folder with the checkpoint, GGUF file, or hub id (of GGUF files with :Q4_K_M)",
    )
    output_path: Path = setting(
        Path("output"), Path, "plan reap prune preview test combine batch serve", "folder for every result"
    )
    pruned_output_path: str = setting(
        "",
        str,
        "prune test serve",
        "folder of the pruned model; empty: a name from model and count, in the output folder",
    )
    hf_token: str = setting(
        "",
        str,
        "plan reap prune preview test",
        "access token of the hub, for private and gated models",
        env="HF_TOKEN",
        secret=True,
    )
    trust_remote_code: bool = setting(
        False, switch, "reap preview test", "run model code that comes with the checkpoint"
    )
    device: str = setting(
        "auto",
        one_of("auto", "cpu", "cuda", "mps"),
        "plan reap preview test",
        "where to compute: auto | cpu | cuda | mps",
    )
    dtype: str = setting(
        "auto",
        one_of("auto", "float32", "bfloat16", "float16"),
        "plan reap preview test",
        "compute in this type; auto: the checkpoint's",
    )
    seed: int = setting(42, whole, "reap prune preview test batch", "seed of every random choice")
    force: bool = setting(
        False, switch, "reap prune preview test combine", "do it again although the result is current"
    )
    runtime: str = setting("auto", one_of("auto", "docker", "native"), "run", "where steps run: auto | docker | native")
    python: str = setting("", str, "run", "interpreter that has the requirements; empty: .venv, which run.sh sets up")
    torch_index: str = setting("", str, "run", "package index with builds of torch for this machine")
    base_image: str = setting("", str, "run", "image to build on; empty: NVIDIA's with a GPU, else a plain Python one")

    calibration_path: str = setting(
        "",
        str,
        "reap",
        "calibration data: file, folder, data sets as name[subset](split):N,..., or a preset; empty: the built-in set",
    )
    columns: str = setting(
        "", str, "reap", "columns of the calibration data, such as prompt=question,answer=reply; empty: guessed"
    )
    packing: str = setting(
        "auto",
        one_of("auto", "on", "off"),
        "reap",
        "several documents in one sequence: auto (off, or the preset's) | on | off",
    )
    thinking: str = setting(
        "auto",
        one_of("auto", "on", "off"),
        "reap",
        "thinking switch of the chat template: auto (its default) | on | off",
    )
    system_prompt: str = setting("", str, "reap", "system prompt for calibration chats that bring none")
    special_tokens: str = setting(
        "skip",
        one_of("count", "skip"),
        "reap",
        "special tokens (begin of text, marks of roles) in the scores: count | skip",
    )
    image_pixels: int = setting(
        1_000_000,
        positive,
        "reap",
        "larger calibration images are scaled down to this many pixels",
    )
    bad_images: int = setting(
        0, natural, "reap", "calibration images that may be missing or damaged before the run ends"
    )
    max_samples: int = setting(512, positive, "plan reap", "calibration samples to use at most")
    max_seq_len: int = setting(2048, positive, "plan reap preview test", "tokens in a sequence at most")
    batch_size: int = setting(8, positive, "plan reap preview test", "sequences that run together")
    scoring_mode: str = setting(
        "routed", one_of("routed", "full", "router"), "reap", "what is measured: routed (REAP) | full | router"
    )
    hidden_memory: int = setting(
        8_000_000_000, amount, "plan reap preview test", "memory for hidden states; what is beyond it goes to the disk"
    )

    prune_ratio: float = setting(0.5, ratio, "plan reap prune", "share of the experts to remove in each layer")
    keep: int = setting(0, natural, "plan prune", "experts to keep in each layer; beats the ratio; 0: unset")
    target_size: int = setting(
        0, amount, "plan prune", "largest size of the result, such as 24GB; beats the ratio; 0: unset"
    )
    metric: str = setting("auto", str, "reap prune preview", "how experts are ranked; auto follows the scoring mode")
    blend: str = setting(
        "auto",
        one_of("auto", "pooled", "weighted", "shares", "maxmin"),
        "reap prune preview",
        "how calibration domains are blended: auto | pooled | weighted | shares | maxmin",
    )
    weights: str = setting("", str, "reap prune preview", "weights of domains, such as code=2,chat=1; others weigh 1")
    protect: str = setting(
        "auto",
        one_of("auto", "none", "super", "outliers"),
        "reap prune preview",
        "experts never removed: auto (those that work mostly for skipped special tokens) | none | super | outliers",
    )
    engine: str = setting(
        "",
        str,
        "plan prune",
        "serving engines to suit, comma separated: vllm, sglang, llama.cpp, trtllm, mlx, transformers",
    )
    expert_parallel: int = setting(1, positive, "plan prune", "expert-parallel ranks that will serve the result")
    tensor_parallel: int = setting(1, positive, "plan prune", "tensor-parallel ranks that will serve the result")
    plan: str = setting(
        "", str, "prune", 'JSON file with the experts to keep, {"keep": {layer: [0, 3, 5]}}; beats scores'
    )
    other_scores: bool = setting(
        False,
        switch,
        "prune preview",
        "use scores of another copy of the model, such as the bf16 original of a quantized one",
    )
    drop_mtp: bool = setting(False, switch, "prune", "remove the layers that predict further tokens (MTP)")
    dry_run: bool = setting(False, switch, "plan prune", "say what would happen and write nothing")

    read_rate: int = setting(
        0, amount, "plan", "bytes per second of the disk, for times in the forecast; 0: measured for a second"
    )
    compute_rate: float = setting(
        0.0, number, "plan", "TFLOP/s for times in the forecast; 0: an earlier run's, else measured for a second"
    )

    evaluation_path: str = setting("", str, "preview test", "held-out data to judge on; empty: the built-in set")
    evaluation_samples: int = setting(
        512, positive, "plan preview test", "held-out samples to compare the two models on at most"
    )
    ratios: str = setting(
        "0.125,0.25,0.375,0.5,0.625,0.75", ratios, "plan preview", "ratios to preview, comma separated"
    )
    metrics: str = setting("", str, "preview", "metrics to preview, comma separated; empty: the one of --metric")
    plans: str = setting("", str, "preview", "JSON files with plans to preview besides, comma separated")
    endpoint: str = setting(
        "", str, "test batch", "OpenAI-compatible server, for test of the pruned model: http://host:8000/v1"
    )
    parent_endpoint: str = setting("", str, "test", "server of the parent, to compare with")
    endpoint_key: str = setting("", str, "test batch", "key for the servers", secret=True)
    generations: int = setting(
        800, positive, "plan test", "prompts to continue at most; fewer than 750 hide doubled loop rates"
    )
    max_new_tokens: int = setting(96, positive, "plan test batch", "tokens to generate for a prompt at most")
    max_kl: float = setting(
        0.5, number, "preview test", "fail above this mean KL divergence to the parent, nats per token"
    )
    max_domain_kl: float = setting(1.5, number, "test", "fail when one domain's mean KL divergence is above this")
    max_chance: float = setting(
        0.75, number, "test", "fail above this share of the KL divergence that cuts of drawn experts have"
    )
    max_loss_increase: float = setting(
        0.5, number, "preview test", "fail above this increase of the loss, nats per token"
    )
    min_same_top: float = setting(
        0.6, number, "test", "fail below this share of tokens with the parent's most likely one"
    )
    max_broken: float = setting(
        0.05, number, "test", "fail when this share of texts is broken beyond the parent's share"
    )
    max_loops: float = setting(0.0, number, "test", "fail when more texts loop: share beyond the parent's")
    max_unended: float = setting(0.1, number, "test", "fail when more texts do not end: share beyond the parent's")
    min_answers: float = setting(
        0.8, number, "test", "fail below this share of the parent's right answers, valid JSON and right keys"
    )
    max_script_drift: float = setting(
        0.05, number, "test", "fail when this share of texts is in another script than the parent's"
    )
    lm_eval: str = setting(
        "", str, "test", "tasks of lm-eval to run on both models, comma separated, if it is installed"
    )
    judge_memory: int = setting(
        0, amount, "test", "memory for loaded models; beyond it they are streamed; 0: what is free"
    )

    prompts_path: str = setting("", str, "batch", "prompts: a folder, or a txt, md, json or jsonl file")
    answers_path: str = setting("", str, "batch", "file of the answers; empty: answers.jsonl in the output folder")
    compare: str = setting("", str, "batch", "answers of another model to put side by side")
    served_model: str = setting(
        "", str, "test batch serve", "name of the model on the server; empty: its folder, or the only"
    )
    api: str = setting(
        "chat", one_of("chat", "completions"), "test batch", "what the server is asked: chat | completions"
    )
    temperature: float = setting(0.0, number, "batch", "0 takes the most likely token")
    concurrency: int = setting(8, positive, "test batch", "prompts that are asked at the same time")
    request_timeout: float = setting(600.0, number, "test batch", "seconds to wait for a byte of an answer")
    attempts: int = setting(8, positive, "test batch", "tries for a prompt; the pauses between them grow to 30 s")

    serve_host: str = setting("127.0.0.1", str, "serve", "address to serve at; 0.0.0.0: all of this machine's")
    serve_port: int = setting(8000, positive, "serve", "port to serve at")
    serve_timeout: float = setting(1800.0, number, "serve", "seconds to wait until the server answers")
    serve_image: str = setting("", str, "serve", "image with vLLM; empty: NVIDIA's")
    serve_python: str = setting("", str, "serve", "interpreter with vLLM, for serving without a container")

    origin: Mapping[str, str] = field(default_factory=dict, compare=False)

    def public(self) -> dict[str, dict[str, Any]]:
        """Values and origins for a result's JSON, without secrets and without what only run.sh reads."""
        shown = [f for f in FIELDS if not f.metadata["secret"] and f.metadata["stages"] != {"run"}]
        return {
            "values": {f.name: _plain(getattr(self, f.name)) for f in shown},
            "origin": {f.name: self.origin.get(f.name, "default") for f in shown},
        }


FIELDS = [f for f in dataclasses.fields(Settings) if f.metadata]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def env_name(f: dataclasses.Field[Any]) -> str:
    """The name of a setting in the environment and in `.env`."""
    return f.metadata["env"] or "REAP_" + f.name.upper()


def flag_name(f: dataclasses.Field[Any]) -> str:
    """The name of a setting on the command line."""
    return "--" + f.name.replace("_", "-")


def shown_default(f: dataclasses.Field[Any]) -> str:
    """The default of a setting as a person would write it in `.env`."""
    value: Any = f.default
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value / 1e9:g}GB" if f.metadata["parse"] is amount and value else str(value)


def resolve(
    stage: str, argv: Sequence[str], environ: Mapping[str, str] | None = None, dotenv: Path = Path(".env")
) -> Settings:
    """The settings of one run of `stage`, each from the strongest place that names it."""
    environ = os.environ if environ is None else environ
    flags = vars(parser(stage).parse_args(argv))
    from_file = read_dotenv(dotenv)
    _refuse_unknown(environ, "the environment")
    _refuse_unknown(from_file, str(dotenv))
    chosen: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for f in FIELDS:
        name = env_name(f)
        places = (
            (flags.get(f.name), flag_name(f)),
            (environ.get(name) or None, f"environment {name}"),  # empty means unset
            (from_file.get(name) or None, f"{dotenv} {name}"),
        )
        for text, place in places:
            if text is not None:
                chosen[f.name], origin[f.name] = _parse(f, text, place), place
                break
    return Settings(**chosen, origin=origin)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the flag that was probably meant, instead of listing all flags."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        words = [word.partition("=")[0].rstrip(":") for word in message.split() if word.startswith("--")]
        guess = next(
            (near for word in words if word not in flags for near in difflib.get_close_matches(word, flags, 1)), ""
        )
        raise UsageError(f"{message}; " + (f"did you mean {guess}?" if guess else "--help lists the flags"))


def parser(stage: str) -> argparse.ArgumentParser:
    """The command line of one stage, made from the table."""
    made = _Parser(description=STAGES[stage], allow_abbrev=False)
    for f in FIELDS:
        if stage in f.metadata["stages"] and not f.metadata["secret"]:
            text = f"{f.metadata['help']} [{env_name(f)}, default {shown_default(f) or 'none'}]".replace("%", "%%")
            # SUPPRESS: a flag that was not typed is absent, so that false, 0 and "" can be said.
            options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text, "metavar": "X"}
            if f.metadata["parse"] is switch:
                options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
            made.add_argument(flag_name(f), **options)
    return made


def _parse(f: dataclasses.Field[Any], text: str, place: str) -> Any:
    try:
        return f.metadata["parse"](text)
    except ValueError as error:
        shown = "(hidden)" if f.metadata["secret"] else repr(text)
        raise UsageError(f"{place}: {shown}: {error}") from None


def _refuse_unknown(names: Mapping[str, str], where: str) -> None:
    known = {env_name(f) for f in FIELDS}
    for name in sorted(n for n in names if n.startswith("REAP_") and n not in known):
        guess = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {guess[0]}?" if guess else "see .env.example for the names"
        raise UsageError(f"{name} in {where} is not a setting; {hint}")
