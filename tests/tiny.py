"""Tiny random checkpoints of every MoE family, made by transformers' own classes: `make("mixtral", folder)`.

One table. An entry names the architecture and only those config fields for which COMMON's small sizes will not do; both
reach every nested config that has a field of that name, so wrappers need no text_config of their own. Vision and audio
towers take their small sizes from TOWER.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = (
    {"vocab_size": 272, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    | dict.fromkeys(("image_token_id", "image_token_index", "video_token_id", "audio_token_id"), 3)
    | dict.fromkeys(("hidden_size", "d_model", "intermediate_size", "d_ff", "ffn_hidden_size", "moe_hidden_size"), 64)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dense_intermediate_size", "projector_hidden_size"), 64)
    | dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32)
    | dict.fromkeys(("shared_intermediate_size", "share_expert_dim", "moe_shared_expert_intermediate_size"), 32)
    | {"num_hidden_layers": 3, "num_layers": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2}
    | {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    | {"encoder_sparse_step": 2, "decoder_sparse_step": 1, "first_k_dense_replace": 1, "num_dense_layers": 1}
    | dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "encoder_attention_heads"), 4)
    | {"decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "sliding_window": 8}
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8)
    | dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2)
    | {"moe_top_k": 2, "zero_expert_num": 4, "n_shared_experts": 1, "num_shared_experts": 1, "enable_moe_block": True}
    | {"n_group": 1, "num_expert_group": 1, "topk_group": 1}
    | {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "o_groups": 2, "o_lora_rank": 16, "hc_mult": 2}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_head_dim": 16, "linear_num_heads": 4, "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16}
    | {"mamba_d_state": 16, "mamba_n_heads": 8, "n_groups": 2, "chunk_size": 16, "mamba_chunk_size": 16}
    | {"vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 16, "swa_num_attention_heads": 4}
    | {"swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8, "kv_channels": 16}
    | {"num_code_groups": 4, "thinker_hidden_size": 64, "projection_hidden_size": 32}
)
TOWER: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "mlp_dim", "d_model"), 32)
    | dict.fromkeys(("encoder_ffn_dim", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    | dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 1)
    | dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads"), 2)
    | {"patch_size": 4, "image_size": 8, "head_dim": 16, "position_embedding_size": 16, "num_position_embeddings": 16}
    | dict.fromkeys(("out_hidden_size", "output_dim", "text_hidden_size", "adapter_out_dim"), 64)
    | {"adapter_in_dim": 32, "adapter_input_size": 32, "downsample_hidden_size": 16, "max_source_positions": 64}
    | {"deepstack_visual_indexes": [0], "vocab_size": 272, "projection_intermediate_size": 32, "pos_emb_height": 4}
    | {"decoder_dim": 32, "codebook_size": 16, "num_quantizers": 4, "mel_vocab_size": 4}
    | {"pos_emb_width": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64}
)
MLA = {"num_key_value_heads": 4}  # latent attention has as many key heads as query heads
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}}
QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "hc_lowrank": 8} | {
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
}
SWA_MLA = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 16,
} | {
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
    "moe_shared_expert_intermediate_size": 32,
}
# What published configs hold and their classes know no default for.
EXTRA: dict[str, dict[str, Any]] = {
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 4},
    "gemma4_text": {"global_head_dim": 32, "num_global_key_value_heads": 1},
    "qwen3_omni_moe": {"thinker_config": {"vision_start_token_id": 4}},
}
OCR_TOWER = {"vision_config": {"sam_config": {"output_channels": 8, "downsample_channels": [16, 32]}}}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", SLIDING),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MLA | {"n_group": 2}),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "afmoe": ("AfmoeForCausalLM", {}),
    "aria_text": ("AriaTextForCausalLM", {}),
    "aria": ("AriaForConditionalGeneration", {}),
    "axk1": ("AXK1ForCausalLM", MLA),
    "axk2": ("AXK2ForCausalLM", MLA),
    "bailing_hybrid": ("BailingHybridForCausalLM", LINEAR | MLA),
    "beam": ("BeamForCausalLM", SPARSE),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {}),
    "dbrx": (
        "DbrxForCausalLM",
        {
            "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
        },
    ),
    "deepseek_ocr2": ("DeepseekOcr2ForConditionalGeneration", OCR_TOWER | SPARSE),
    "deepseek_v2": ("DeepseekV2ForCausalLM", MLA),
    "deepseek_v32": ("DeepseekV32ForCausalLM", MLA),
    "deepseek_v4": ("DeepseekV4ForCausalLM", {}),
    "diffusion_gemma": ("DiffusionGemmaForBlockDiffusion", {}),
    "dots1": ("Dots1ForCausalLM", {}),
    "dots3_note": (
        "Dots3NoteForConditionalGeneration",
        MLA | {"text_config": SWA_MLA, "vision_config": {"num_hidden_layers": 2, "pyramid_num_routed": [-1, 4]}},
    ),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeForConditionalGeneration", MROPE | {"moe_intermediate_size": [32, 16]}),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", {}),
    "flint": ("FlintForCausalLM", {}),
    "gemma4": ("Gemma4ForConditionalGeneration", {}),
    "gemma4_text": ("Gemma4ForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", MLA),
    "glm4v_moe": (
        "Glm4vMoeForConditionalGeneration",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    ),
    "glm5_next": (
        "Glm5NextForConditionalGeneration",
        MLA
        | SPARSE
        | {
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "index_kpool": 4,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        },
    ),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", MLA),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", {}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {"layer_types": ["mamba", "attention", "mamba"]}),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {}),
    "hy_v3": ("HYV3ForCausalLM", {}),
    "hy_v4": ("HYV4ForCausalLM", {}),
    "inkling2_text": ("Inkling2ForCausalLM", {}),
    "inkling_mm_model": (
        "InklingForConditionalGeneration",
        {
            "vision_config": {"num_hidden_layers": 4, "patch_size": 2},
            "audio_config": {"mel_vocab_size": 4},
        },
    ),
    "inkling_text": ("InklingForCausalLM", {}),
    "jamba": ("JambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0}),
    "jetmoe": ("JetMoeForCausalLM", {}),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", MLA),
    "kimi_linear": ("KimiLinearForCausalLM", LINEAR | MLA | {"q_lora_rank": None}),
    "kolibri1": ("Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", {}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}),
    "llama4": ("Llama4ForConditionalGeneration", {}),
    "llama4_text": ("Llama4ForCausalLM", {}),
    "longcat_flash": ("LongcatFlashForCausalLM", MLA),
    "mellum": ("MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {}),
    "minimax": ("MiniMaxForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "minimax_m3_vl": ("MiniMaxM3SparseForConditionalGeneration", {}),
    "minimax_m3_vl_text": (
        "MiniMaxM3VLForCausalLM",
        SPARSE | {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]},
    ),
    "mistral4": ("Mistral4ForCausalLM", MLA),
    "mistral_large4": ("MistralLarge4ForConditionalGeneration", MLA),
    "muse_spark": (
        "MuseSparkForConditionalGeneration",
        {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}},
    ),
    "nemotron_h": ("NemotronHForCausalLM", {}),
    "nllb-moe": ("NllbMoeForConditionalGeneration", {}),
    "olmoe": ("OlmoeForCausalLM", {}),
    "openai_privacy_filter": ("OpenAIPrivacyFilterForTokenClassification", {}),
    "phimoe": ("PhimoeForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", LINEAR),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", LINEAR),
    "qwen3_next": ("Qwen3NextForCausalLM", LINEAR),
    "qwen3_omni_moe_thinker": ("Qwen3OmniMoeThinkerForConditionalGeneration", {}),
    "qwen3_omni_moe": (
        "Qwen3OmniMoeForConditionalGeneration",
        {"talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 32}}},
    ),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", {}),
    "qwen4_exp": ("Qwen4ExpForConditionalGeneration", LINEAR | QSA),
    "qwen4_exp_text": ("Qwen4ExpForCausalLM", LINEAR | QSA),
    "solar_open": ("SolarOpenForCausalLM", {}),
    "step3p7": ("Step3p7ForConditionalGeneration", SPARSE),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", {}),
    "unlimited_ocr": ("UnlimitedOcrForConditionalGeneration", OCR_TOWER),
    "zaya": ("ZayaForCausalLM", {"num_experts_per_tok": 1}),
}


def config(family: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """The small config of a family. An override reaches every config of the tree that has the field."""
    architecture, special = FAMILIES[family]
    extra = EXTRA.get(family, {})
    return _config(getattr(transformers, architecture).config_class, extra | special | overrides, extra=extra)


def _config(
    kind: type[Any], special: dict[str, Any], tower: bool = False, extra: Mapping[str, Any] | None = None
) -> Any:
    extra = {name: value for name, value in (extra or {}).items() if name not in kind.sub_configs_defaults}
    known = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in (TOWER if tower else COMMON).items() if name in known}
    values |= {name: value for name, value in special.items() if name in known}
    for name, spec in kind.sub_configs_defaults.items():
        given = special.get(name, {})  # may hold what is no field, but taken by the config class all the same
        sub = spec.config_class
        if sub is transformers.AutoConfig:
            sub = type(transformers.AutoConfig.for_model(spec.model_type))
        inner = tower or any(word in name for word in ("vision", "audio", "code2wav"))
        values[name] = _config(sub, given if inner else special | given, inner, given)
    return kind(**values | extra)


def build(family: str, **overrides: Any) -> transformers.PreTrainedModel:
    """The model itself, with seeded random weights that are large enough for a wrong slice to show."""
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[family][0])(config(family, **overrides)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            _randomise(name, tensor, model.config)
    return model


def _randomise(name: str, tensor: torch.Tensor, model_config: Any) -> None:
    """Matrices of unit gain; vectors a little off what they were, so that no two experts are alike."""
    if name.endswith("tid2eid"):
        experts = model_config.n_routed_experts
        tensor.copy_(torch.stack([torch.randperm(experts)[: tensor.shape[1]] for _ in range(len(tensor))]))
    elif not tensor.is_floating_point() or any(part in name for part in ("A_log", "dt_bias", "inv_freq", "conv")):
        return
    elif tensor.ndim >= 2:
        tensor.normal_(0, tensor.shape[-1] ** -0.5)
    else:
        tensor.add_(torch.randn_like(tensor) * 0.1)


def make(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a tiny checkpoint of `family` into `folder`; `max_shard_size` among the overrides splits it."""
    shard = overrides.pop("max_shard_size", "5GB")
    build(family, **overrides).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Save a byte-level tokenizer of 264 tokens: 8 special ones, then one per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|image|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    return fast


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it lies on disk."""
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]
