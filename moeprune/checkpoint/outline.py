"""The tensors of a model whose weights need not be here: from headers where these can be had, else predicted.

complete folder, GGUF file      headers on this disk
hub id                          headers at the hub, a few hundred kB for each shard
config.json and the index       names and total size are read; sizes of experts follow from the config
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from moeprune.checkpoint.folder import INDEX, Checkpoint, innermost, open_checkpoint
from moeprune.checkpoint.headers import Tensor
from moeprune.checkpoint.predicted import index_of, predicted, without_weights
from moeprune.errors import InputError, MachineError, UsageError
from moeprune.metadata import read_json

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Outline:
    """A checkpoint as far as it is known, and how it became known."""

    checkpoint: Checkpoint
    measured: bool  # False: sizes of single tensors are predicted, only their sum is known
    source: str


def open_outline(model: str, token: str = "") -> Outline:
    """The outline of a folder, complete or not, or of a model at the hub; no weight is read or fetched."""
    path = Path(model).expanduser()
    if not model:
        raise UsageError("no model given; pass --model-path or set REAP_MODEL_PATH to a folder or a hub id")
    if path.is_dir() and not _is_complete(path):
        return Outline(predicted(path), False, "names and total size from the index, sizes of experts from config.json")
    if path.exists():
        return Outline(open_checkpoint(path), True, "headers on this disk")
    if not HUB_ID.fullmatch(model):
        raise InputError(f"no model at {model}; give a folder that exists, or a hub id such as Qwen/Qwen3-30B-A3B")
    repo, _, revision = model.partition("@")
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise MachineError(f"huggingface_hub is not installed, so {repo} cannot be asked for; give a folder") from None
    try:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision or None)
    except HFValidationError:
        raise InputError(f"no folder at {repo}, and no model of the hub has such a name; check the path") from None
    if isinstance(cached, str) and _is_complete(Path(cached).parent):
        return Outline(open_checkpoint(Path(cached).parent), True, "headers in the hub's cache on this disk")
    return Outline(_from_hub(repo, revision or None, token), True, "headers at the hub")


def _is_complete(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return True  # a GGUF folder, or nothing that could be predicted: open_checkpoint says which
    if (folder / INDEX).is_file():
        names = index_of(folder)["weight_map"].values()
        return all((folder / name).is_file() for name in set(names))
    return any(folder.glob("*.safetensors"))


def _from_hub(repo: str, revision: str | None, token: str) -> Checkpoint:
    """Config and headers; the library fetches the headers by range."""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        SafetensorsParsingError,
    )

    # The library lets errors of its HTTP client through, which is another package in each of its releases.
    transport = import_module(type(get_session()).__module__.partition(".")[0])
    api = HfApi(token=token or None)
    try:
        found = api.get_safetensors_metadata(repo, revision=revision)
        config = read_json(Path(api.hf_hub_download(repo, "config.json", revision=revision)), "the model's config.json")
    except (RepositoryNotFoundError, NotASafetensorsRepoError):
        raise InputError(
            f"the hub shows no safetensors weights of {repo}: check the name; a private model needs HF_TOKEN, "
            "and a GGUF file has to be on this disk"
        ) from None
    # What answers need not be a hub, and then sends anything.
    except (HfHubHTTPError, EntryNotFoundError, SafetensorsParsingError, transport.HTTPError, OSError, ValueError) as e:
        raise MachineError(
            f"{repo} is no folder here, and the hub did not answer ({innermost(e)}); "
            f"a folder with config.json and {INDEX} is enough"
        ) from None
    tensors = {}
    for file, header in found.files_metadata.items():
        for name, info in header.tensors.items():
            tensors[name] = Tensor(name, info.dtype, tuple(info.shape), Path(file), *info.data_offsets)
    return without_weights(Path(repo), config, tensors)
