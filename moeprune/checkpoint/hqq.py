"""A router that HQQ has quantized, cut exactly.

HQQ lays a matrix [E, I] out as a grid of groups [E G, g] and packs it share over share: with four bits, a stored row r
holds row r of the grid in its high bits and row r + E G / 2 in its low ones. So the values of the experts that stay are
taken out and packed again; scales and zero points have rows of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from moeprune.arrays import NDArray, np
from moeprune.checkpoint.bnb import Made
from moeprune.checkpoint.headers import Tensor
from moeprune.errors import InputError

PACKING = re.compile(r"(\d)bit_u?(8|32)")


def made(tensor: Tensor, read: Callable[[str], bytes], experts: int, keep: Sequence[int]) -> Made:
    """The new form of the router's values, or of the shape beside them."""
    base, _, part = tensor.name.rpartition(".")
    try:
        parts = {what: read(f"{base}.{what}") for what in ("shape", "axis", "packing")}
    except KeyError as error:
        raise InputError(f"{base} is a router of HQQ without {error}; fetch the model again") from None
    shape, axis = np.frombuffer(parts["shape"], "<i8").tolist(), int.from_bytes(parts["axis"], "little")
    if len(shape) != 2 or shape[0] != experts or axis != 1:
        raise InputError(
            f"{tensor.name}: groups along axis {axis} of a matrix {shape} run across the {experts} experts of the "
            "router; keep it unquantized"
        )
    if part == "shape":
        return Made("I64", (2,), np.array([len(keep), shape[1]], "<i8").tobytes())
    packing = PACKING.fullmatch(parts["packing"].decode(errors="replace"))
    if packing is None:
        raise InputError(f"{base}.packing names a way to pack that is not known; keep the router unquantized")
    bits, item = int(packing[1]), np.dtype("<u4" if packing[2] == "32" else "u1")
    stored = np.frombuffer(read(tensor.name), item).reshape(tensor.shape[0], -1)
    width = stored.shape[1]
    values = _unpacked(stored, bits, item.itemsize * 8 // bits)[: math.prod(shape) // width]
    packed = _packed(tensor.name, values.reshape(experts, -1, width)[list(keep)].reshape(-1, width), bits, item)
    return Made(tensor.dtype, (len(packed), *tensor.shape[1:]), packed.tobytes())


def _unpacked(stored: NDArray[np.uint32], bits: int, shares: int) -> NDArray[np.uint32]:
    return np.concatenate([(stored >> bits * share) & (2**bits - 1) for share in reversed(range(shares))])


def _packed(name: str, values: NDArray[np.uint32], bits: int, item: np.dtype[np.uint32]) -> NDArray[np.uint32]:
    """Share over share; where HQQ knows of no padding, the rows must divide into shares."""
    shares = item.itemsize * 8 // bits
    rows = -(-len(values) // shares)
    if item.itemsize == 1 and rows * shares != len(values):
        raise InputError(
            f"{name}: {len(values)} groups of the experts that stay do not divide into {shares} shares; "
            f"keep another number of experts, such as a multiple of {shares}"
        )
    grid = np.zeros((shares * rows, values.shape[1]), item)
    grid[: len(values)] = values
    result = np.zeros((rows, values.shape[1]), item)
    for share in range(shares):
        result |= grid[share * rows : (share + 1) * rows] << np.array(bits * (shares - 1 - share), item)
    return result
