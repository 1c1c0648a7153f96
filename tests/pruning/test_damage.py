"""Whatever goes wrong: no folder that looks like a result, one clear line, the right exit code, the input untouched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.pruning import cutting


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("gpt_oss", tmp_path_factory.mktemp("oss") / "parent", max_shard_size="200KB")


@pytest.fixture
def flags(parent: Path, tmp_path: Path) -> list[str]:
    plan = cutting.write_plan(tmp_path / "plan.json", cutting.keep_lists(parent, 4))
    return ["--model-path", str(parent), "--plan", str(plan), "--pruned-output-path", str(tmp_path / "child")]


def digest(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The exit code, and one line of error that holds the words."""
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0]


def test_killed_in_the_middle_and_run_again(parent: Path, tmp_path: Path, flags: list[str]) -> None:
    before = digest(parent)
    code = (
        "import signal, sys, prune_model; from moeprune.checkpoint import writer; write = writer.write_file\n"
        "def slow(folder, file, go_on):\n"
        "    path = write(folder, file, go_on)\n"
        "    if '00002' in file.name: print('now', flush=True); signal.pause()\n"
        "    return path\n"
        "writer.write_file = slow; prune_model.main(sys.argv[1:])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *flags], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "child").exists()
    assert any((tmp_path / "child.partial").iterdir())
    again = cutting.run(*flags, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child", "plan.json"]
    assert digest(parent) == before
    undisturbed = cutting.run(*flags[:-1], str(tmp_path / "other"), cwd=tmp_path)
    assert undisturbed.returncode == 0
    same = digest(tmp_path / "child").keys() - {"pruning.json"}
    assert all((tmp_path / "child" / n).read_bytes() == (tmp_path / "other" / n).read_bytes() for n in same)


def test_interrupted_leaves_nothing(parent: Path, tmp_path: Path, flags: list[str]) -> None:
    """A byte is read at a time here, so the stage is in the middle of a file when it is told to stop."""
    code = (
        "import os, sys, time, prune_model; from moeprune import errors; read = os.preadv\n"
        "def slow(source, buffers, offset):\n"
        "    print('now', flush=True); time.sleep(0.1); return read(source, [buffers[0][:1]], offset)\n"
        "os.preadv = slow; errors.run(prune_model.main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 143
    assert said.splitlines()[-1].startswith("error: stopped by SIGTERM")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]


def test_two_at_once(parent: Path, tmp_path: Path, flags: list[str]) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from moeprune.checkpoint import writer\n"
        "with writer.beside(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').touch(); print('now', flush=True); signal.pause()"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "child")], stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()
    one_line(cutting.run(*flags, cwd=tmp_path), 4, "another run is writing")
    assert (tmp_path / "child.partial" / "half").exists()  # the first one's work is not touched
    first.kill()
    first.wait()
    first.stdout.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_no_space_left(parent: Path, tmp_path: Path, flags: list[str]) -> None:
    before = digest(parent)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        tell_nothing = "import sys, prune_model; from moeprune import errors; from moeprune.checkpoint import writer\n"
        tell_nothing += "writer.check_room = lambda *_: None; errors.run(prune_model.main)"
        argv = [*flags[:-1], str(small / "child")]
        one_line(cutting.run(*argv, cwd=tmp_path), 4, "needs", "free")
        command = [sys.executable, "-c", tell_nothing, *argv]
        done = subprocess.run(command, capture_output=True, text=True)
        one_line(done, 4, "no space left", str(small))
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
    assert digest(parent) == before


def test_file_too_large_for_the_file_system(parent: Path, tmp_path: Path, flags: list[str]) -> None:
    code = (
        "import resource, sys, prune_model; from moeprune import errors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); errors.run(prune_model.main)"
    )
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    one_line(done, 4, "as large as")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]


def copy_of(parent: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_truncated_source(parent: Path, tmp_path: Path, flags: list[str]) -> None:
    damaged = copy_of(parent, tmp_path)
    shard = sorted(damaged.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    one_line(cutting.run("--model-path", str(damaged), *flags[2:], cwd=tmp_path), 3, shard.name, "truncated")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "plan.json"]


def test_source_cut_while_it_is_read(parent: Path, tmp_path: Path, flags: list[str]) -> None:
    damaged = copy_of(parent, tmp_path)
    shard = sorted(damaged.glob("*.safetensors"))[-1]
    code = (
        "import os, sys, prune_model; from moeprune import errors; from moeprune.checkpoint import writer\n"
        "write = writer.write_file\n"
        "def cutting(*args): os.truncate(sys.argv[-1], 9000); return write(*args)\n"
        "writer.write_file = cutting; errors.run(lambda argv: prune_model.main(argv[:-1]))"
    )
    argv = ["--model-path", str(damaged), *flags[2:], str(shard)]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    one_line(done, 3, shard.name, "ends at byte")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "plan.json"]


def test_missing_things(parent: Path, tmp_path: Path, flags: list[str]) -> None:
    one_line(cutting.run("--model-path", str(tmp_path / "nothing"), *flags[2:], cwd=tmp_path), 3, "no model")
    one_line(cutting.run(*flags[:2], cwd=tmp_path), 3, "no scores at output/reap_metadata.json", "./run.sh reap")
    missing = [*flags[:3], str(tmp_path / "absent.json"), *flags[4:]]
    one_line(cutting.run(*missing, cwd=tmp_path), 3, "absent.json")
    one_line(cutting.run(*flags, "--engine", "abacus", cwd=tmp_path), 2, "abacus")
