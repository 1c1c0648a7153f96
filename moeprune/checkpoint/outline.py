"""The tensors of a model whose weights need not be here: from headers where these can be had, else predicted.

complete folder, GGUF file      headers on this disk
hub id                          headers at the hub, a few hundred kB for each shard, a few MB of a GGUF file
config.json and the index       names and total size are read; sizes of experts follow from the config
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moeprune.checkpoint import gguf, hub
from moeprune.checkpoint.folder import INDEX, Checkpoint, fetched_gguf, named_gguf, of_gguf, open_checkpoint
from moeprune.checkpoint.headers import Tensor
from moeprune.checkpoint.predicted import index_of, predicted, without_weights
from moeprune.errors import StageError, UsageError
from moeprune.metadata import read_json

IN_CACHE = "headers in the hub's cache on this disk"


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
    address = hub.parse(model)
    return _gguf_at_hub(address, token) if address.quant else _at_hub(address, token)


def _is_complete(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return True  # a GGUF folder, or nothing that could be predicted: open_checkpoint says which
    if (folder / INDEX).is_file():
        names = index_of(folder)["weight_map"].values()
        return all((folder / name).is_file() for name in set(names))
    return any(folder.glob("*.safetensors"))


def _at_hub(address: hub.Address, token: str) -> Outline:
    """Config and headers; the library fetches the headers by range."""
    with hub.answering(address.repo, f"a folder with config.json and {INDEX} is enough"):
        from huggingface_hub import HfApi, try_to_load_from_cache

        repo, revision = address.repo, address.revision
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        if isinstance(cached, str) and _is_complete(Path(cached).parent):
            return Outline(open_checkpoint(Path(cached).parent), True, IN_CACHE)
        api = HfApi(token=token or None)
        found = api.get_safetensors_metadata(repo, revision=revision)
        config = read_json(Path(api.hf_hub_download(repo, "config.json", revision=revision)), "the model's config.json")
    tensors = {}
    for file, header in found.files_metadata.items():
        for name, info in header.tensors.items():
            tensors[name] = Tensor(name, info.dtype, tuple(info.shape), Path(file), *info.data_offsets)
    return Outline(without_weights(Path(address.repo), config, tensors), True, "headers at the hub")


def _gguf_at_hub(address: hub.Address, token: str) -> Outline:
    """The headers of one GGUF model of a repository."""
    with suppress(StageError):
        return Outline(open_checkpoint(fetched_gguf(address, token, local=True)), True, IN_CACHE)
    with hub.answering(address.repo, "give a GGUF file on this disk"):
        names = hub.file_names(address, token)
        files = gguf.split_set(named_gguf(address, names), names.__contains__)
        place = Path(address.repo)
        headers = {place / file: gguf.parse(place / file, hub.Distant(address, file, token)) for file in files}
    return Outline(of_gguf(headers), True, "headers at the hub")
