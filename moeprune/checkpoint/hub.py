"""Models at the hub: what an address names, fetching, and reading the beginning of a file that stays there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from moeprune.errors import InputError, MachineError

ADDRESS = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(:(?P<quant>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
STEP = 4 << 20  # bytes of a request; the header of a GGUF file holds the vocabulary, a few MB
TRY_AGAIN = (
    "give the folder of a model on this disk, or try again when the hub answers (a private model needs HF_TOKEN)"
)


@dataclass(frozen=True)
class Address:
    """owner/name, or owner/name:Q4_K_M for one model of a repository of GGUF files; @revision may follow."""

    text: str
    repo: str
    quant: str | None
    revision: str | None


def parse(text: str) -> Address:
    """An address of the hub, which `text` must be, as no file is there."""
    match = ADDRESS.fullmatch(text)
    if match is None:
        raise InputError(f"no model at {text}; give a folder that exists, or a hub id such as Qwen/Qwen3-30B-A3B")
    return Address(text, match["repo"], match["quant"], match["revision"])


@contextmanager
def answering(repo: str, instead: str = TRY_AGAIN) -> Iterator[None]:
    """What the hub answers, and what its library makes of it, in one line; `instead` says what to do without it."""
    try:
        from huggingface_hub import errors, get_session
    except ImportError:
        raise MachineError(f"huggingface_hub is not installed, so {repo} cannot be asked for; give a folder") from None
    # The library lets errors of its HTTP client through, which is another package in each of its releases.
    transport = import_module(type(get_session()).__module__.partition(".")[0])
    try:
        yield
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"the hub knows no model {repo} (or it is private: set HF_TOKEN); a local folder works too"
        ) from None
    except errors.NotASafetensorsRepoError:
        raise InputError(
            f"the hub shows no safetensors weights of {repo}: check the name; a private model needs HF_TOKEN, and a "
            f"GGUF file is named by its numbers: {repo}:Q4_K_M"
        ) from None
    except errors.HFValidationError:
        raise InputError(f"no folder at {repo}, and no model of the hub has such a name; check the path") from None
    # What answers need not be a hub, and then sends anything.
    except (errors.HfHubHTTPError, errors.SafetensorsParsingError, transport.HTTPError, OSError, ValueError) as error:
        reason = innermost(error)
        raise MachineError(f"{repo} is no folder here, and the hub did not deliver it ({reason}); {instead}") from None


def innermost(error: BaseException) -> str:
    """What went wrong first, in one line: the library wraps it in advice for programmers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def download(
    address: Address, token: str, *, only: Sequence[str] = (), never: Sequence[str] = (), local: bool = False
) -> Path:
    """The folder of a model in the hub's cache, as far as the patterns want it; what is not here is fetched."""
    with answering(address.repo):
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            address.repo,
            revision=address.revision,
            token=token or None,
            allow_patterns=list(only) or None,
            ignore_patterns=list(never),
            local_files_only=local,
        )
    return Path(found)


def file_names(address: Address, token: str) -> list[Path]:
    """Every file of a repository."""
    from huggingface_hub import HfApi

    about = HfApi(token=token or None).model_info(address.repo, revision=address.revision)
    return [Path(file.rfilename) for file in about.siblings or ()]


class Distant:
    """The bytes of a file at the hub, of which only the first are fetched, as far as they are looked at."""

    def __init__(self, address: Address, file: Path, token: str) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self._url = hf_hub_url(address.repo, file.as_posix(), revision=address.revision)
        self._headers = build_hf_headers(token=token or None)
        self._size, self._here = 0, b""
        self._fetch(STEP)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        if part.stop > len(self._here):
            self._fetch(max(part.stop, 2 * len(self._here)))
        return self._here[part]

    def _fetch(self, end: int) -> None:
        """Everything up to `end`; a server that does not know ranges is not read in whole."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        wanted = {"Range": f"bytes={len(self._here)}-{end - 1}"}
        with get_session().stream("GET", self._url, headers=self._headers | wanted) as response:
            if response.status_code >= 400:
                response.read()  # says why
            hf_raise_for_status(response)
            total = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code != 206 or total is None:
                raise ValueError("it sends no parts of files")
            self._here += response.read()
        self._size = int(total[1])
