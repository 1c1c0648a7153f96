"""What engines accept, as collected from their sources, and the move to a count that suits."""

from __future__ import annotations

import pytest

from moeprune.errors import UsageError
from moeprune.planning import engines
from moeprune.planning.decision import choose_count
from moeprune.planning.engines import Case
from moeprune.planning.plan import Limits
from moeprune.settings import Settings, resolve

QWEN = Limits(128, 8)
V3 = Limits(256, 8, 8, 4)
V4 = Limits(256, 6)


def severities(engine, count, limits=QWEN, **more):
    return [o.severity for o in engines.objections(Case(count, limits, **more), [engine])]


def test_deepseek_v4_on_vllm_has_a_hard_list():
    accepted = {1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576}
    for count in range(1, 600):
        hard = "fail" in severities("vllm", count, Limits(600, 1), model_type="deepseek_v4")
        assert hard == (count not in accepted)
    for count in (144, 160, 168, 173, 180):
        assert severities("vllm", count, V4, model_type="deepseek_v4") == ["fail"]
        assert "fail" not in severities("vllm", count, V4, model_type="deepseek_v3")


def test_slow_paths():
    assert severities("vllm", 64) == []
    assert severities("vllm", 96) == ["slow"]
    assert severities("vllm", 384, Limits(512, 8)) == ["slow"]
    assert severities("vllm", 512, Limits(512, 8, 8, 4)) == ["slow", "slow"]
    assert severities("sglang", 64, V3) == []
    assert severities("sglang", 96, V3) == ["old", "slow"]
    assert severities("llama.cpp", 288, Limits(384, 8)) == severities("llama.cpp", 384, Limits(384, 8)) == []
    assert severities("sglang", 256, Limits(512, 8, 8, 4)) == []
    assert severities("sglang", 512, Limits(512, 8, 8, 4)) == ["slow"]
    assert severities("sglang", 384, Limits(512, 8)) == ["old"]
    assert severities("trtllm", 128, Limits(256, 8, 8, 4)) == severities("trtllm", 128, Limits(256, 10, 1, 1)) == []
    assert (
        severities("trtllm", 128, Limits(256, 10, 8, 4)) == severities("trtllm", 128, Limits(256, 8, 8, 5)) == ["old"]
    )
    assert severities("llama.cpp", 96) == ["slow"]
    assert severities("llama.cpp", 576, Limits(600, 8)) == ["fail"]
    assert severities("llama.cpp", 64, Limits(128, 1), model_type="llama4") == ["fail"]
    assert severities("llama.cpp", 8, Limits(16, 1), model_type="llama4") == []
    assert severities("trtllm", 100, V4, model_type="deepseek_v4") == ["fail", "slow"]
    assert severities("mlx", 96) == severities("transformers", 96) == []


def settings(**values):
    return Settings(**values)


def test_default_warns_for_the_common_engines_and_moves_nothing():
    choice = choose_count(settings(prune_ratio=0.3), QWEN)
    assert choice.count == 90 and choice.notes == ()
    assert any("slower path on vllm" in line and "llama.cpp" in line for line in choice.warnings)
    assert all(line.endswith("; 64 would suit them all") for line in choice.warnings)
    assert choose_count(settings(prune_ratio=0.5), QWEN).warnings == ()


def test_named_engines_move_a_ratio_up_and_say_why():
    choice = choose_count(settings(prune_ratio=0.4, engine="vllm"), V4, "deepseek_v4")
    assert choice.count == 192
    assert "192 experts are kept instead of 154" in choice.notes[0] and "DeepSeek-V4" in choice.notes[0]
    choice = choose_count(settings(prune_ratio=0.3, expert_parallel=8), QWEN)
    assert choice.count == 96 and "8 expert-parallel ranks" in choice.notes[0]
    both = choose_count(settings(prune_ratio=0.4, engine="vllm,trtllm", expert_parallel=6), V4, "deepseek_v4")
    assert both.count == 192


def test_a_count_given_by_hand_is_refused_not_moved():
    assert choose_count(settings(keep=96, expert_parallel=8), QWEN).count == 96
    with pytest.raises(UsageError, match=r"--keep 90: .*8 expert-parallel ranks; the nearest that works is 96"):
        choose_count(settings(keep=90, expert_parallel=8), QWEN)
    with pytest.raises(UsageError, match=r"--keep 160: .*DeepSeek-V4.*nearest that works is 192"):
        choose_count(settings(keep=160, engine="vllm"), V4, "deepseek_v4")


def test_a_target_size_moves_down():
    options = {"fixed_bytes": 1_000, "bytes_per_expert": 100}
    choice = choose_count(settings(target_size=18_000, engine="vllm"), V4, "deepseek_v4", **options)
    assert choice.count == 128  # 170 would fit
    assert choose_count(settings(target_size=18_000), V4, **options).count == 170
    with pytest.raises(UsageError, match="at most 7"):
        choose_count(settings(target_size=1_700, engine="vllm", expert_parallel=16), Limits(256, 4), **options)


def test_the_wish_from_the_strongest_place_counts(tmp_path):
    dotenv = tmp_path / ".env"
    dotenv.write_text("REAP_KEEP=96\nREAP_TARGET_SIZE=9kB\n")
    sizes = {"fixed_bytes": 1_000, "bytes_per_expert": 100}

    def count(*flags, **environment):
        chosen = resolve("prune", flags, {f"REAP_{k.upper()}": v for k, v in environment.items()}, dotenv)
        return choose_count(chosen, QWEN, **sizes).count

    assert count() == 96
    assert count("--prune-ratio", "0.25") == count(prune_ratio="0.25") == 96 == 128 - 32
    assert count("--prune-ratio", "0.75") == count(prune_ratio="0.75") == 32
    assert count("--target-size", "5kB") == count(target_size="5kB") == 40
    assert count("--target-size", "5kB", "--keep", "64", prune_ratio="0.75") == 64
    assert count("--target-size", "5kB", keep="64") == 40
    assert count(keep="64", prune_ratio="0.75") == 64


def test_parallel_ranks_that_no_count_can_mend():
    with pytest.raises(UsageError, match="2 tensor-parallel ranks are not a multiple of 4"):
        choose_count(settings(engine="sglang", expert_parallel=4, tensor_parallel=2), QWEN)
    with pytest.raises(UsageError, match="4 expert-parallel ranks are not a multiple of 3"):
        choose_count(settings(engine="vllm", expert_parallel=4, tensor_parallel=3), QWEN)
    assert choose_count(settings(engine="sglang,trtllm", expert_parallel=4, tensor_parallel=8), QWEN).count == 64
    assert choose_count(settings(engine="vllm", expert_parallel=8, tensor_parallel=2), QWEN).count == 64


def test_groups_and_engines_together():
    choice = choose_count(settings(prune_ratio=0.33, expert_parallel=16), V3)
    assert choice.count == 176  # 172 asked; 8 groups, 16 ranks
    choice = choose_count(settings(prune_ratio=0.3, engine="transformers"), V3)
    assert choice.count == 184 and choice.notes == (
        "184 experts are kept instead of 180: the router works on 8 groups of the same size",
    )


def test_names_of_engines():
    assert engines.parse_engines(" vLLM, llama.cpp,vllm ") == ("vllm", "llama.cpp")
    with pytest.raises(UsageError, match="'ollama' is not known; use vllm"):
        engines.parse_engines("ollama")
