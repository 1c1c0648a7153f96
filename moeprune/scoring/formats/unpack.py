"""The arithmetic of number formats: packed bits, scales and zero points -> float32. Nothing here knows names or files.

Every product is one of two float32 numbers and is rounded once, to the type that computes. Leading axes (experts) pass
through. Legend of the array suffixes: O outputs of a linear layer, I inputs, W packed words, G groups along the inputs.
"""

from __future__ import annotations

import torch

from moeprune.errors import InputError

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where AWQ puts the eight values of a word: value i lies in nibble AWQ_ORDER[i]


def fp4(packed: torch.Tensor) -> torch.Tensor:
    """Two E2M1 values a byte along the last axis, the low nibble first."""
    table = torch.tensor(FP4, dtype=torch.float32, device=packed.device)
    bytes_ = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(-2)
    return table[nibbles.int()]


def exponents(scale: torch.Tensor) -> torch.Tensor:
    """E8M0 scales, as that type or as raw bytes: powers of two."""
    raw = scale.view(torch.uint8) if scale.dtype != torch.uint8 else scale
    return torch.ldexp(torch.ones(raw.shape, device=scale.device), raw.int() - 127)


def integers(words: torch.Tensor, bits: int, count: int | None = None) -> torch.Tensor:
    """Unsigned values of `bits` bits along the last axis, packed densely into 32-bit words, lowest bits first."""
    wide = words.view(torch.int32).long() & 0xFFFFFFFF
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, device=words.device)
        values = ((wide.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
    else:  # values cross the words' boundaries
        stream = ((wide.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1).flatten(-2)
        whole = stream.shape[-1] // bits * bits
        powers = 2 ** torch.arange(bits, device=words.device)
        values = (stream[..., :whole].unflatten(-1, (-1, bits)) * powers).sum(-1)
    kept: torch.Tensor = values[..., :count].int()
    return kept


def spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None = None) -> torch.Tensor:
    """A grid of scales over the last two axes, brought to the shape of the weight; the last block may be cut short."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 2 * len(shape):  # modelopt keeps an axis of one between blocks
        scale = scale.reshape(scale.shape[::2])
    if scale.dim() + 1 == len(shape) == 3 and scale.shape[-1] == shape[-1] != shape[-2]:
        scale = scale.unsqueeze(-2)  # [E, I, O]: one for each output
    while scale.dim() < len(shape):
        scale = scale.unsqueeze(-1)
    for axis, position in ((-2, 0), (-1, 1)):
        have, want = scale.shape[axis], shape[axis]
        if have not in (1, want):
            size = block_size(want, have, block[position] if block else None)
            scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, want)
    return scale


def block_size(length: int, blocks: int, said: int | None = None) -> int:
    """How many neighbours share a scale: what the settings say, where it fits; else an even share or a power of two."""
    powers = (2**exponent for exponent in range(16))
    guesses = [said] if said and said > 0 else []
    guesses += [length // blocks] if length % blocks == 0 else powers
    size = next((size for size in guesses if -(-length // size) == blocks), 0)
    if not size:
        raise InputError(f"{blocks} scales for {length} values: the size of the blocks is unclear")
    return size


def scaled(value: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
    """Values times their scale: one for all, one a row, or one a block."""
    return value.float() * spread(scale, value.shape, block)


def grouped(
    value_OI: torch.Tensor,
    scale_OG: torch.Tensor,
    zero_OG: torch.Tensor | None,
    group_I: torch.Tensor | None = None,
    group: int | None = None,
) -> torch.Tensor:
    """(value - zero) * scale, a group of neighbouring inputs (or the inputs that `group_I` assigns) sharing both."""
    inputs, groups = value_OI.shape[-1], scale_OG.shape[-1]
    if group_I is None:
        group_I = torch.arange(inputs, device=value_OI.device) // block_size(inputs, groups, group)
    index_I = group_I.long()
    scale_OI = scale_OG.float().index_select(-1, index_I)
    if zero_OG is None:
        return value_OI.float() * scale_OI
    return (value_OI - zero_OG.index_select(-1, index_I)).float() * scale_OI


def awq(
    qweight_IW: torch.Tensor, qzeros_GW: torch.Tensor, scales_GO: torch.Tensor, bits: int = 4, group: int | None = None
) -> torch.Tensor:
    """AWQ: words of eight outputs in AWQ's own order; [I, O] on disk, [O, I] here. Other bits lie in plain order."""
    order = torch.tensor(AWQ_ORDER, device=qweight_IW.device)

    def outputs(words: torch.Tensor) -> torch.Tensor:
        values = integers(words, bits, scales_GO.shape[-1])
        return values.unflatten(-1, (-1, 8))[..., order].flatten(-2) if bits == 4 else values

    return grouped(outputs(qweight_IW).mT, scales_GO.mT, outputs(qzeros_GW).mT, group=group)


def gptq(
    qweight_WO: torch.Tensor,
    qzeros_GW: torch.Tensor,
    scales_GO: torch.Tensor,
    group_I: torch.Tensor | None,
    *,
    bits: int,
    first_version: bool,
    group: int | None = None,
) -> torch.Tensor:
    """GPTQ: inputs packed down the columns. The first version of the format stores zero points less one."""
    value_OI = integers(qweight_WO.mT.contiguous(), bits)
    zero_GO = integers(qzeros_GW, bits, scales_GO.shape[-1])
    if first_version:
        zero_GO = (zero_GO + 1) & (2**bits - 1)
    if group_I is not None:
        value_OI = value_OI[..., : len(group_I)]
    return grouped(value_OI, scales_GO.mT, zero_GO.mT, group_I, group)


def bitsandbytes_4bit(
    packed: torch.Tensor, table: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...], blocksize: int
) -> torch.Tensor:
    """bitsandbytes NF4 and FP4: a flat row of nibbles, the high one first, and one scale a block."""
    flat = packed.reshape(-1)
    nibbles = torch.stack((flat >> 4, flat & 15), dim=-1).reshape(-1)
    value = table.float()[nibbles.int()]
    scale = absmax.float().repeat_interleave(blocksize)[: len(value)]
    return (value * scale)[: torch.Size(shape).numel()].view(shape)


def nested_absmax(
    absmax: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, offset: float, blocksize: int
) -> torch.Tensor:
    """bitsandbytes scales that were quantized themselves."""
    value = table.float()[absmax.int()]
    return value * scale.float().repeat_interleave(blocksize)[: len(value)] + offset


def signed_nibbles(packed: torch.Tensor, axis: int) -> torch.Tensor:
    """Two neighbours along the axis (-2: outputs, -1: inputs) in a byte, the low nibble first, as signed numbers."""
    low, high = packed & 15, (packed >> 4) & 15
    nibbles = torch.stack((low, high), dim=axis).flatten(axis - 1, axis).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def affine(
    value_OI: torch.Tensor, scale_OG: torch.Tensor, offset_OG: torch.Tensor, group: int | None = None
) -> torch.Tensor:
    """value * scale + offset, a group of neighbouring inputs sharing both."""
    inputs, groups = value_OI.shape[-1], scale_OG.shape[-1]
    index_I = torch.arange(inputs, device=value_OI.device) // block_size(inputs, groups, group)
    scale_OI, offset_OI = (grid.float().index_select(-1, index_I) for grid in (scale_OG, offset_OG))
    return value_OI.float() * scale_OI + offset_OI


def tiles(words: torch.Tensor) -> torch.Tensor:
    """Four-bit values in the order of NVIDIA's tensor cores, [O / 8, I / 32 P, 32, P] words of eight -> [O, I].

    Lane t of a tile holds row t // 4. Of 32 neighbouring inputs its word has pairs i = 0..3 that begin at
    8 i + 2 (t % 4): their first values in the four low nibbles, their second ones in the four high nibbles.
    """
    shifts = torch.arange(0, 32, 4, device=words.device)
    nibbles = (words.unsqueeze(-1) >> shifts) & 15
    tile_row_column = nibbles.unflatten(-3, (8, 4)).unflatten(-1, (2, 4))  # [tile, super, row, t, P, second, i]
    ordered = tile_row_column.movedim((-7, -5, -6, -3, -1, -4, -2), (-7, -6, -5, -4, -3, -2, -1))
    values: torch.Tensor = ordered.flatten(-5, -1).flatten(-3, -2)
    return values


def in_bytes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned values of a whole share of a byte along the last axis, lowest bits first."""
    shifts = torch.arange(0, 8, bits, device=packed.device)
    values: torch.Tensor = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
    return values


def pieces(packed: torch.Tensor, bits: int, *, high_first: bool) -> torch.Tensor:
    """Rows of unsigned values whose first, second, ... share lie over each other in the bits of one row of items."""
    shifts = range(0, packed.element_size() * 8 // bits * bits, bits)
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in (reversed(shifts) if high_first else shifts)])


def codebooks(codes: torch.Tensor, books: torch.Tensor) -> torch.Tensor:
    """The sum of one entry of each book: codes [outputs / o, inputs / i, books], books [books, entries, o, i]."""
    index = codes.long() % books.shape[1]  # codes are stored as signed numbers
    return torch.stack([book[at] for book, at in zip(books.float(), index.unbind(-1), strict=True)]).sum(0)
