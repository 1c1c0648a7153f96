"""For verify.py: routers that bitsandbytes has quantized, whose scales may change their form but not their values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moeprune.arrays import NDArray, np
from moeprune.errors import ResultError
from moeprune.pruning.evidence import Reader, Stored

Companions = Mapping[str, bytes]  # absmax, quant_state, nested_... -> content
COMPANION = re.compile(r"(?P<matrix>.+\.weight)\.(?P<what>absmax|nested_\w+|quant_state)(\.bitsandbytes__\w+)?")


def matrix_of(name: str, tensors: Mapping[str, Stored]) -> str:
    """The flat matrix that a tensor accompanies, or nothing."""
    found = COMPANION.fullmatch(name)
    matrix = tensors.get(found["matrix"]) if found else None
    flat = matrix is not None and matrix.dtype == "U8" and matrix.shape[1:] == (1,)
    return found["matrix"] if found and flat else ""


def companions(matrix: str, tensors: Mapping[str, Stored], reader: Reader) -> Companions:
    """The contents of all companions of a matrix."""
    found = {name: match for name in tensors if name.startswith(matrix) and (match := COMPANION.fullmatch(name))}
    return {match["what"]: reader.read(tensors[name], 0, tensors[name].nbytes) for name, match in found.items()}


def check(matrix: str, before: Companions, after: Companions, keep: Sequence[int]) -> None:
    """The scales of the kept experts must be the very same numbers, and the description must fit them."""
    old, new = json.loads(before["quant_state"]), json.loads(after["quant_state"])
    experts, width = old["shape"]
    if new != {key: value for key, value in old.items() if "nested" not in key} | {"shape": [len(keep), width]}:
        raise ResultError(f"{matrix}: its description became {new}")
    scales = _scales(old, before)
    each = len(scales) // experts
    wanted = np.concatenate([scales[expert * each : (expert + 1) * each] for expert in keep])
    if wanted.tobytes() != _scales(new, after).tobytes():
        raise ResultError(f"{matrix} does not have the scales of the kept experts")


def _scales(state: Mapping[str, Any], stored: Companions) -> NDArray[np.float32]:
    """Every scale as a number: of 8 bits, by a table, a coarser scale for each run, and an offset for all."""
    if "nested_absmax" not in stored:
        return np.frombuffer(stored["absmax"], "<f4")
    table, coarse = (np.frombuffer(stored[name], "<f4") for name in ("nested_quant_map", "nested_absmax"))
    fine = np.frombuffer(stored["absmax"], np.uint8)
    runs = np.repeat(coarse, state["nested_blocksize"])[: len(fine)]
    scales: NDArray[np.float32] = table[fine] * runs + np.float32(state["nested_offset"])
    return scales
