"""For verify.py: routers that HQQ has quantized, whose values are packed across experts and so are packed anew."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moeprune.arrays import NDArray, np
from moeprune.errors import ResultError
from moeprune.pruning.evidence import Reader, Stored

PARTS = ("W_q", "shape", "packing")
# Way to pack -> type of an item, and where in it the values lie, first share first.
SHIFTS = {
    "8bit_u8": ("u1", 255, (0,)),
    "4bit_u8": ("u1", 15, (4, 0)),
    "2bit_u8": ("u1", 3, (6, 4, 2, 0)),
    "1bit_u8": ("u1", 1, (7, 6, 5, 4, 3, 2, 1, 0)),
    "3bit_32": ("<u4", 7, (27, 24, 21, 18, 15, 12, 9, 6, 3, 0)),
}


def matrix_of(name: str, tensors: Mapping[str, Stored]) -> str:
    """The matrix whose values, or whose shape, a tensor holds; or nothing."""
    module, _, part = name.rpartition(".")
    return f"{module}.W_q" if part in PARTS[:2] and f"{module}.W_q" in tensors else ""


def companions(matrix: str, tensors: Mapping[str, Stored], reader: Reader) -> Mapping[str, bytes]:
    """The contents that say what the values are."""
    stored = {part: tensors[re.sub(r"W_q$", part, matrix)] for part in PARTS}
    return {part: reader.read(tensor, 0, tensor.nbytes) for part, tensor in stored.items()}


def check(matrix: str, before: Mapping[str, bytes], after: Mapping[str, bytes], keep: Sequence[int]) -> None:
    """Every value of a kept expert must be what it was, and the shape must count them."""
    old, new = (np.frombuffer(side["shape"], "<i8").tolist() for side in (before, after))
    if new != [len(keep), old[1]]:
        raise ResultError(f"{matrix}: its shape became {new}")
    values = [_values(side, *shape) for side, shape in ((before, old), (after, new))]
    if not np.array_equal(values[0][list(keep)], values[1]):
        raise ResultError(f"{matrix} does not hold the values of the kept experts")


def _values(stored: Mapping[str, bytes], experts: int, inputs: int) -> NDArray[np.uint32]:
    """One row for each expert; what fills the last share up is left out."""
    kind, mask, shifts = SHIFTS[stored["packing"].decode()]
    items = np.frombuffer(stored["W_q"], kind)
    flat = np.concatenate([items >> np.array(shift, kind) & np.array(mask, kind) for shift in shifts])
    return flat[: experts * inputs].reshape(experts, inputs)
