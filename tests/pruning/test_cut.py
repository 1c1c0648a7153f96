"""The stage as a person meets it: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import prune_model
from moeprune import metadata
from moeprune.checkpoint import families, folder
from moeprune.errors import InputError, MachineError, UsageError
from tests import tiny
from tests.pruning import cutting


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of 8 experts in five shards, with everything that lies beside weights on the hub."""
    path = tiny.make("qwen3_moe", tmp_path_factory.mktemp("qwen") / "parent", max_shard_size="200KB")
    tiny.tokenizer(path)
    (path / "modeling_custom.py").write_text("# code that comes with the model\n")
    (path / "assets").mkdir()
    (path / "assets" / "picture.bin").write_bytes(bytes(range(256)))
    (path / "pytorch_model.bin").write_bytes(b"all experts once more")
    return path


def snapshot(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def weights(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder by the safetensors library: dtype, shape, bytes."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                view = opened.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()), opened.get_tensor(name).tobytes())
    return found


def shard_sizes(path: Path) -> list[list[int]]:
    """The bytes of every tensor, shard by shard."""
    opened = [safe_open(file, "np") for file in path.glob("*.safetensors")]
    return [[file.get_tensor(name).nbytes for name in file.keys()] for file in opened]  # noqa: SIM118


def scored(output: Path, parent: Path, best: list[int]) -> None:
    """Stage 1's result with sums under which the experts `best` are the best of every block, first to last."""
    checkpoint = folder.open_checkpoint(parent)
    blocks = []
    for block in families.understand(checkpoint).blocks:
        gain_E = np.zeros(block.experts)
        gain_E[best] = np.arange(len(best), 0, -1)
        values = {"count": np.ones((1, block.experts)), "gate_norm_sum": gain_E[None]}
        values |= dict.fromkeys(("gate_sum", "norm_sum", "max_abs", "gate_norm_sq_sum"), np.ones((1, block.experts)))
        slices = {name: np.ones((1, 4, block.experts)) for name in ("count", "gate_norm_sum")}
        blocks.append(metadata.BlockSums(block.name, block.experts, np.ones(1), values, slices))
    sums = metadata.Sums("routed", ("all",), tuple(blocks))
    model = {"fingerprint": checkpoint.fingerprint, "path": str(parent)}
    result = metadata.header("reap_metadata") | {"inputs": {"model": model}, "scores": sums.to_json()}
    metadata.write_json(output / "reap_metadata.json", result)


def test_every_byte_is_accounted_for(parent: Path, tmp_path: Path) -> None:
    before, keep = snapshot(parent), cutting.keep_lists(parent, 5)
    plan = cutting.write_plan(tmp_path / "plan.json", keep)
    prune_model.main(
        ["--model-path", str(parent), "--plan", str(plan), "--pruned-output-path", str(tmp_path / "child")]
    )
    old, new = weights(parent), weights(tmp_path / "child")
    expected = {}
    for name, (dtype, shape, data) in old.items():
        block = next((b for b in keep if name.startswith(f"{b}.")), "")
        words = name.split(".")
        if "experts" in words:
            number = int(words[words.index("experts") + 1])
            if number in keep[block]:
                renamed = name.replace(f"experts.{number}.", f"experts.{keep[block].index(number)}.")
                expected[renamed] = (dtype, shape, data)
        elif name.endswith("mlp.gate.weight"):
            rows = np.frombuffer(data, np.uint8).reshape(shape[0], -1)[keep[block]]
            expected[name] = (dtype, (5, *shape[1:]), rows.tobytes())
        else:
            expected[name] = (dtype, shape, data)
    assert new == expected
    assert snapshot(parent) == before


def test_what_lies_beside_the_weights(parent: Path, tmp_path: Path) -> None:
    scored(tmp_path, parent, [1, 2, 3, 4])
    done = cutting.run("--model-path", str(parent), "--output-path", str(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/parent-reap-4of8\n"), done.stderr
    child = tmp_path / "parent-reap-4of8"
    old, new = snapshot(parent), snapshot(child)
    shards = {name for name in [*old, *new] if name.endswith(".safetensors")}
    ours = {"pruning.json", "reap_metadata.json"}
    assert new.keys() - shards == (old.keys() - shards - {"pytorch_model.bin"}) | ours
    changed = {name for name in old.keys() & new.keys() - shards if old[name] != new[name]}
    assert changed == {"config.json", "model.safetensors.index.json"}
    assert new["reap_metadata.json"] == (tmp_path / "reap_metadata.json").read_bytes()
    lines = zip(old["config.json"].splitlines(), new["config.json"].splitlines(), strict=True)
    assert [b for a, b in lines if a != b] == [b'  "num_local_experts": 4,']
    assert "pytorch_model.bin" in done.stderr  # it is said what stays behind
    assert json.loads(new["pruning.json"])["keep"] == {f"model.layers.{i}": [1, 2, 3, 4] for i in range(3)}
    with safe_open(next(child.glob("*.safetensors")), "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    index = json.loads(new["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in weights(child).values())
    assert all((child / file).is_file() for file in index["weight_map"].values())
    largest = max(sum(sizes) for sizes in shard_sizes(parent))
    assert all(sum(sizes) <= largest for sizes in shard_sizes(child))
    assert len(shard_sizes(child)) == 3  # of five: they are packed anew


def test_current_result_is_left_alone(parent: Path, tmp_path: Path) -> None:
    scored(tmp_path, parent, [0, 1, 2, 3])
    flags = ["--model-path", str(parent), "--output-path", str(tmp_path)]
    assert cutting.run(*flags, cwd=tmp_path).returncode == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "parent-reap-4of8").iterdir()}
    again = cutting.run(*flags, cwd=tmp_path)
    assert again.returncode == 0
    assert "is current" in again.stderr
    assert again.stdout == f"{tmp_path}/parent-reap-4of8\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parent-reap-4of8").iterdir()} == times
    scored(tmp_path, parent, [4, 5, 6, 7])
    other = cutting.run(*flags, cwd=tmp_path)
    assert other.returncode == 2
    assert "--force" in other.stderr
    assert cutting.run(*flags, "--force", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "parent-reap-4of8/pruning.json").read_text())["keep"]["model.layers.0"] == [
        4,
        5,
        6,
        7,
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parent-reap-4of8", "reap_metadata.json"]


def test_result_that_lost_a_shard_is_not_current(parent: Path, tmp_path: Path) -> None:
    scored(tmp_path, parent, [0, 1, 2, 3])
    flags = ["--model-path", str(parent), "--output-path", str(tmp_path)]
    prune_model.main(flags)
    shard = next((tmp_path / "parent-reap-4of8").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(UsageError, match="--force"):
        prune_model.main(flags)
    prune_model.main([*flags, "--force"])
    assert shard.exists()


def test_cut_of_a_cut_is_the_cut(parent: Path, tmp_path: Path) -> None:
    once = cut_to(parent, tmp_path / "once", [0, 2, 3, 5, 7])
    assert weights(cut_to(once, tmp_path / "twice", [1, 2, 4])) == weights(
        cut_to(parent, tmp_path / "direct", [2, 3, 7])
    )


def cut_to(model: Path, target: Path, ids: list[int]) -> Path:
    plan = cutting.write_plan(target.with_suffix(".json"), {f"model.layers.{i}": ids for i in range(3)})
    prune_model.main(["--model-path", str(model), "--plan", str(plan), "--pruned-output-path", str(target)])
    return target


def test_dry_run_predicts_and_writes_nothing(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored(tmp_path, parent, [0, 1, 2, 3])
    flags = ["--model-path", str(parent), "--output-path", str(tmp_path), "--keep", "3"]
    prune_model.main([*flags, "--dry-run"])
    said = capsys.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == ["reap_metadata.json"]
    predicted = json.loads(said.out)
    assert sum(predicted["actions"].values()) == len(weights(parent))
    for word in ("copy", "rename", "slice", "drop", "disk", "memory"):
        assert word in said.err
    prune_model.main(flags)
    written = sum(p.stat().st_size for p in (tmp_path / "parent-reap-3of8").glob("*.safetensors"))
    assert predicted["after_bytes"] == written


def test_target_size_is_kept(parent: Path, tmp_path: Path) -> None:
    scored(tmp_path, parent, [0, 1, 2, 3])
    whole = sum(len(data) for data in snapshot(parent).values())
    flags = ["--model-path", str(parent), "--output-path", str(tmp_path), "--target-size", f"{whole * 3 // 4}"]
    prune_model.main(flags)
    child = next(tmp_path.glob("parent-reap-*"))
    weights_written = sum(p.stat().st_size for p in child.glob("*.safetensors"))
    assert weights_written <= whole * 3 // 4
    kept = len(json.loads((child / "pruning.json").read_text())["keep"]["model.layers.0"])
    prune_model.main([*flags[:-2], "--keep", str(kept + 1)])
    larger = tmp_path / f"parent-reap-{kept + 1}of8"
    assert sum(p.stat().st_size for p in larger.glob("*.safetensors")) > whole * 3 // 4


def refused(parent: Path, tmp_path: Path, keep: object, *flags: str) -> str:
    """The message with which a plan is refused; nothing may have been written."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(keep))
    out = tmp_path / "out"
    with pytest.raises((UsageError, InputError, MachineError)) as caught:
        prune_model.main(["--model-path", str(parent), "--plan", str(plan), "--output-path", str(out), *flags])
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda keep: keep.pop("model.layers.1"), "no list for model.layers.1"),
        (lambda keep: keep.update({"model.layers.9": [0, 1]}), "model.layers.9"),
        (lambda keep: keep.update({"model.layers.1": [0, 1]}), "same number"),
        (lambda keep: keep.update({"model.layers.1": [3, 1, 5]}), "ascending"),
        (lambda keep: keep.update({"model.layers.1": [1, 1, 5]}), "ascending"),
        (lambda keep: keep.update({"model.layers.1": [1, 5, 8]}), "between 0 and 7"),
        (lambda keep: keep.update({"model.layers.1": [-1, 5, 6]}), "between 0 and 7"),
        (lambda keep: keep.update({block: [4] for block in keep}), "chooses 2 experts"),
    ],
)
def test_unfit_plans_are_refused(parent: Path, tmp_path: Path, change, words: str) -> None:
    keep = {f"model.layers.{i}": [0, 3, 5] for i in range(3)}
    change(keep)
    assert words in refused(parent, tmp_path, {"keep": keep})


def test_a_layer_that_a_plan_names_twice(parent: Path, tmp_path: Path) -> None:
    """Of two lists nobody can say which is meant."""
    lists = ", ".join(f'"model.layers.{i}": [0, 3, {last}]' for i in range(3) for last in (4, 5))
    (tmp_path / "twice.json").write_text(f'{{"keep": {{{lists}}}}}')
    with pytest.raises(InputError, match=r"'model\.layers\.0' appears twice"):
        prune_model.main(["--model-path", str(parent), "--plan", str(tmp_path / "twice.json")])


@pytest.mark.parametrize(
    "plan", [{}, {"keep": {}}, {"keep": [1]}, {"keep": {"model.layers.0": "0,1"}}, {"keep": {"a": [1.5]}}]
)
def test_files_that_are_no_plan(parent: Path, tmp_path: Path, plan: object) -> None:
    assert '{"keep":' in refused(parent, tmp_path, plan)


def test_groups_must_shrink_alike(tmp_path: Path) -> None:
    model = tiny.make("deepseek_v3", tmp_path / "model")
    plan = {"keep": {"model.layers.1": [0, 1, 2, 4], "model.layers.2": [0, 1, 4, 5]}}
    assert "[3, 1] experts in the groups of model.layers.1" in refused(model, tmp_path, plan)


def test_scores_of_another_model(parent: Path, tmp_path: Path) -> None:
    scored(tmp_path, parent, [0, 1, 2, 3])
    other = tiny.make("qwen3_moe", tmp_path / "other", vocab_size=280)
    flags = ["--model-path", str(other), "--output-path", str(tmp_path)]
    with pytest.raises(InputError, match="another model"):
        prune_model.main(flags)
    prune_model.main([*flags, "--other-scores"])
    assert (tmp_path / "other-reap-4of8").is_dir()
    path = tmp_path / "reap_metadata.json"
    path.write_text(json.dumps({name: v for name, v in json.loads(path.read_text()).items() if name != "scores"}))
    with pytest.raises(InputError, match="scores are damaged"):
        prune_model.main([*flags, "--other-scores"])


def test_folders_in_use_are_refused(parent: Path, tmp_path: Path) -> None:
    plan = {"keep": {f"model.layers.{i}": [0, 3, 5] for i in range(3)}}
    for bad in (parent, parent / "inside", parent.parent):
        assert "choose another folder" in refused(parent, tmp_path, plan, "--pruned-output-path", str(bad))
    for bad in (parent, parent / "inside"):
        assert "choose another folder" in refused(parent, tmp_path, plan, "--output-path", str(bad), "--dry-run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "not made by this tool" in refused(
        parent, tmp_path, plan, "--pruned-output-path", str(tmp_path / "mine"), "--force"
    )
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_two_wishes_on_one_command_line(parent: Path, tmp_path: Path) -> None:
    flags = ["--model-path", str(parent), "--output-path", str(tmp_path)]
    pairs = (
        ["--keep", "4", "--prune-ratio", "0"],
        ["--target-size", "1GB", "--keep", "4"],
        ["--plan", "x", "--keep", "4"],
    )
    for pair in pairs:
        with pytest.raises(UsageError, match=r"--\S+ and --\S+ each say how many"):
            prune_model.main([*flags, *pair])
    with pytest.raises(InputError, match="no scores"):  # 0 says that no count is wished for
        prune_model.main([*flags, "--keep", "0", "--prune-ratio", "0.5"])


def test_a_cut_by_a_plan_does_without_numpy(parent: Path, tmp_path: Path) -> None:
    plan = cutting.write_plan(tmp_path / "plan.json", cutting.keep_lists(parent, 3))
    flags = ["--model-path", str(parent), "--plan", str(plan), "--pruned-output-path", str(tmp_path / "child")]
    code = "import sys, prune_model; prune_model.main(sys.argv[1:]); sys.exit('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=cutting.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "child" / "pruning.json").is_file()


def test_small_disk_is_refused(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    plan = {"keep": {f"model.layers.{i}": [0, 3, 5] for i in range(3)}}
    assert "1 kB free and the result needs" in refused(parent, tmp_path, plan)


def test_single_file_stays_single(tmp_path: Path) -> None:
    parent = tiny.make("mixtral", tmp_path / "parent")
    child = cutting.cut(parent, cutting.keep_lists(parent, 4))
    assert [path.name for path in child.glob("model*")] == ["model.safetensors"]


def test_model_in_the_hub_cache(parent: Path, tmp_path: Path) -> None:
    """Links to blobs become files, and the result has the model's name and not that of a revision."""
    cache = tmp_path / "models--maker--Tiny-MoE"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "0123abc").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in parent.iterdir() if p.is_file())):
        (cache / "blobs" / str(number)).write_bytes(path.read_bytes())
        (cache / "snapshots" / "0123abc" / path.name).symlink_to(Path("../../blobs") / str(number))
    plan = cutting.write_plan(tmp_path / "plan.json", {f"model.layers.{i}": [0, 3, 5] for i in range(3)})
    flags = ["--model-path", str(cache / "snapshots" / "0123abc"), "--plan", str(plan)]
    prune_model.main([*flags, "--output-path", str(tmp_path / "out")])
    child = tmp_path / "out" / "Tiny-MoE-reap-3of8"
    assert not any(path.is_symlink() for path in child.rglob("*"))
    assert weights(child) == weights(cut_to(parent, tmp_path / "plain", [0, 3, 5]))


def test_starts_without_torch(parent: Path, tmp_path: Path) -> None:
    plan = cutting.write_plan(tmp_path / "plan.json", {f"model.layers.{i}": [0, 3, 5] for i in range(3)})
    code = "import sys, prune_model; prune_model.main(sys.argv[1:]); print(*{'torch', 'transformers'} & {*sys.modules})"
    flags = ["--model-path", str(parent), "--plan", str(plan), "--output-path", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{tmp_path}/parent-reap-3of8", ""], done.stderr
