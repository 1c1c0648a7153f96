"""Named recipes: data with the lengths and packing that belong to it; settings that were given beat them."""

from __future__ import annotations

from dataclasses import dataclass

from moeprune.settings import Settings


@dataclass(frozen=True)
class Preset:
    """One recipe. `max_samples` counts packed sequences where the recipe packs."""

    spec: str
    max_samples: int
    max_seq_len: int
    packing: bool
    about: str


CODE, XLAM, AGENT = (
    "theblackcat102/evol-codealpaca-v1",
    "Salesforce/xlam-function-calling-60k",
    "SWE-bench/SWE-smith-trajectories(tool)",
)
THOUGHTS = "open-r1/Mixture-of-Thoughts"
STORIES, MATHS = "euclaise/WritingPrompts_curated", "allenai/tulu-3-sft-personas-math"

# The settings of the REAP paper (arXiv 2510.13999) and of the recipe that its authors recommend for large models.
# Its three seeds are 42 (the default here), 11 and 99.
PRESETS: dict[str, Preset] = {
    "paper-code": Preset(CODE, 1024, 2048, True, "coding and multiple choice, models up to 110B"),
    "paper-web": Preset("allenai/c4", 1024, 2048, True, "the general-text ablation"),
    "paper-writing": Preset(STORIES, 1024, 2048, True, "creative writing"),
    "paper-maths": Preset(MATHS, 1024, 2048, True, "mathematics"),
    "paper-combined": Preset(f"{CODE},{STORIES},{MATHS}", 3072, 2048, True, "code, writing and maths together"),
    "paper-large": Preset(
        f"{CODE}:4076,{XLAM}:4076,{AGENT}:4076",
        12_228,
        16_384,
        False,
        "models of 110B and more; equal parts are our reading",
    ),
    "paper-reasoning": Preset(
        f"{CODE}:4096,{THOUGHTS}[code]:4096,{THOUGHTS}[math]:4096,{THOUGHTS}[science]:4096,{XLAM}:4096,{AGENT}:4096",
        24_576,
        16_384,
        False,
        "large reasoning models: the recipe of the authors' README",
    ),
    "paper-kimi-linear": Preset(
        f"{CODE}:4069,{XLAM}:4069,{AGENT}:4069,allenai/WildChat-1M:4069,AI-MO/NuminaMath-CoT:4069,CohereLabs/aya_dataset:4069",
        24_414,
        16_384,
        False,
        "the mix published for Kimi-Linear",
    ),
}


@dataclass(frozen=True)
class Plan:
    """What to load, after the preset and the given settings have been weighed."""

    spec: str
    max_samples: int
    max_seq_len: int
    packing: bool
    capped: bool  # whether max_samples bounds entries that name their own number


def plan_for(settings: Settings) -> Plan:
    """The settings, with the preset's values wherever nothing was said."""
    preset = PRESETS.get(settings.calibration_path)
    given = settings.origin
    if preset is None:
        packing = settings.packing == "on"
        capped = "max_samples" in given
        return Plan(settings.calibration_path, settings.max_samples, settings.max_seq_len, packing, capped)
    return Plan(
        preset.spec,
        settings.max_samples if "max_samples" in given else preset.max_samples,
        settings.max_seq_len if "max_seq_len" in given else preset.max_seq_len,
        preset.packing if settings.packing == "auto" else settings.packing == "on",
        capped=True,
    )
