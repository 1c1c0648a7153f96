"""Add up the sums of several runs: the same model and measurement, different calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moeprune.arrays import Array
from moeprune.console import warn
from moeprune.errors import InputError
from moeprune.metadata import BlockSums, Sums


def add(first: Sums, second: Sums) -> Sums:
    """The sums of a run on both runs' samples. A domain that both have is one domain.

    The inner products of ean_ca are lost: those between the two runs' outputs were never measured.
    """
    if first.mode != second.mode:
        raise InputError(f"scoring modes differ: {first.mode} and {second.mode}; score again in one of them")
    shapes = [{block.block: block.experts for block in sums.blocks} for sums in (first, second)]
    if shapes[0] != shapes[1]:
        raise InputError("the runs have other layers or numbers of experts, so they are not of the same model")
    domains = tuple(dict.fromkeys((*first.domains, *second.domains)))
    other = {block.block: block for block in second.blocks}
    blocks = [
        _add_blocks(_spread(block, first.domains, domains), _spread(other[block.block], second.domains, domains))
        for block in first.blocks
    ]
    return Sums(first.mode, domains, tuple(blocks))


def _spread(block: BlockSums, own: Sequence[str], domains: Sequence[str]) -> BlockSums:
    """The same block with a place for every domain; the places of the others are zero."""
    places = [domains.index(name) for name in own]

    def widened(array: Array) -> Array:
        wide: Array = np.zeros((len(domains), *array.shape[1:]))
        wide[places] = array
        return wide

    return replace(
        block,
        tokens_D=widened(block.tokens_D),
        values={name: widened(array) for name, array in block.values.items()},
        slices={name: widened(array) for name, array in block.slices.items()},
        gram_EDD=None,
    )


def _add_blocks(a: BlockSums, b: BlockSums) -> BlockSums:
    same = a.values.keys() == b.values.keys() and a.slices.keys() == b.slices.keys()
    if not same or any(a.slices[name].shape != b.slices[name].shape for name in a.slices):
        raise InputError(f"layer {a.block} was measured differently in the runs; score again with the same release")
    join = {name: np.maximum if name == "max_abs" else np.add for name in a.values}
    return replace(
        a,
        tokens_D=a.tokens_D + b.tokens_D,
        values={name: join[name](a.values[name], b.values[name]) for name in a.values},
        slices={name: a.slices[name] + b.slices[name] for name in a.slices},
    )


def total_of(calibrations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The calibration entry of the combined result: totals over the runs, and what each run was made from."""
    domains: dict[str, dict[str, int]] = {}
    for calibration in calibrations:
        for name, counts in calibration.get("domains", {}).items():
            total = domains.setdefault(name, {})
            for key, count in counts.items():
                total[key] = total.get(key, 0) + count
    return {
        "source": "combined",
        "samples": sum(calibration.get("samples", 0) for calibration in calibrations),
        "tokens": sum(calibration.get("tokens", 0) for calibration in calibrations),
        "domains": domains,
        "parts": [part for calibration in calibrations for part in parts_of(calibration)],
    }


def parts_of(calibration: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The single runs' calibrations behind a result that may itself be combined."""
    return list(calibration.get("parts", [calibration]))


def check_inputs(inputs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Refuse runs on different models, and data that would count twice; warn where only some samples would."""
    seen: dict[str, str] = {}
    used: dict[str, str] = {}  # sample -> the run that has it
    model = inputs[0].get("model", {}).get("fingerprint")
    for entry, name in zip(inputs, names, strict=True):
        if not model or entry.get("model", {}).get("fingerprint") != model:
            raise InputError(f"{name} was made on another model than {names[0]}; only runs on one model can be added")
        for part in parts_of(entry.get("calibration", {})):
            data = str(part.get("fingerprint"))
            if data in seen:
                raise InputError(f"{name} and {seen[data]} hold the same calibration data, which would count twice")
            seen[data] = name
            samples = part.get("sample_digests", ())
            _warn_of_overlap(name, samples, used)
            used |= dict.fromkeys(samples, name)


def _warn_of_overlap(name: str, samples: Sequence[str], used: Mapping[str, str]) -> None:
    """Another seed or size of the same data is other data, but not all of it."""
    both = set(samples) & used.keys()
    if both:
        others = " and ".join(sorted({used[sample] for sample in both}))
        warn(f"{len(both)} of {len(set(samples))} samples of {name} are also in {others}; they count twice")
