"""run.sh with stub programs first in PATH: where a step runs, with which words, and what it says when it cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A stub notes its name and words and leaves with the status in <name>.status, if there is one.
STUB = """#!/bin/bash
printf '%s' "${0##*/}" >>"$CALLS"; printf ' %s' "$@" >>"$CALLS"; printf '\\n' >>"$CALLS"
exit "$(cat "$0.status" 2>/dev/null || echo 0)"
"""


class Place:
    """A copy of run.sh in a folder of its own, with stubs instead of the world."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.bin.mkdir(parents=True)
        (self.folder / "output").mkdir(parents=True)
        shutil.copy(ROOT / "run.sh", self.folder)
        for name in ("requirements.txt", "requirements-dev.txt", "Dockerfile"):
            (self.folder / name).write_text("numpy\n")
        self.stub("interpreter")

    def stub(self, name: str, status: int = 0) -> None:
        """Put a program of this name first in PATH."""
        (self.bin / name).write_text(STUB)
        (self.bin / name).chmod(0o755)
        (self.bin / f"{name}.status").write_text(str(status))

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run ./run.sh from another folder, with nothing of the tester's environment."""
        base = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.folder.parent),
            "CALLS": str(self.calls_file),
            "REAP_PYTHON": str(self.bin / "interpreter"),
        }
        self.calls_file.unlink(missing_ok=True)
        command = ["bash", str(self.folder / "run.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd="/", env=base | environ)

    def calls(self, name: str) -> list[str]:
        """The words that a stub was called with, one string per call."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line.partition(" ")[2] for line in lines if line.partition(" ")[0] == name]

    def steps(self) -> list[str]:
        """Calls of `docker compose run`."""
        calls = [call for call in self.calls("docker") if call.startswith("compose run")]
        return [re.sub(r" --name moeprune-\d+", "", call) for call in calls]


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    made.stub("docker", 1)
    made.stub("nvidia-smi", 1)
    return made


def test_an_interpreter_that_is_not_there_is_said(place):
    done = place.run("prune", REAP_PYTHON="/no/python")
    assert done.returncode == 2
    assert "REAP_PYTHON names no program: /no/python" in done.stderr


def test_dotenv_from_windows(place):
    (place.folder / ".env").write_bytes(b"REAP_RUNTIME=native\r\n")
    assert place.run("prune").returncode == 0
    assert place.calls("interpreter") == ["prune_model.py"]


def test_help_lists_every_command(place):
    done = place.run("help")
    assert done.returncode == 0
    text = (ROOT / "run.sh").read_text()
    for verb in (
        "demo",
        "plan",
        "reap",
        "preview",
        "prune",
        "test",
        "full",
        "combine",
        "batch",
        "doctor",
        "build",
        "shell",
        "check",
    ):
        assert f"\n  {verb} " in done.stdout, verb
        assert re.search(rf"^    {verb}\)", text, re.MULTILINE), verb
    assert place.run().stdout == done.stdout


def test_words_reach_the_script_untouched(place):
    words = ["--prune-ratio", "0.25", "--system-prompt", "two  words *", "--force"]
    done = place.run("prune", *words)
    assert done.returncode == 0, done.stderr
    assert place.calls("interpreter") == ["prune_model.py " + " ".join(words)]
    assert "no Docker here: running on this machine" in done.stderr
    printed = next(line for line in done.stderr.splitlines() if line.startswith("run.sh: + "))
    assert r"two\ \ words\ \*" in printed
    assert done.stdout == ""


def test_a_signal_to_run_sh_reaches_the_step(place):
    (place.bin / "interpreter").write_text('#!/bin/bash\ntrap "echo caught >>$CALLS; exit 143" TERM\n'
                                           'echo started >>"$CALLS"\nwhile :; do sleep 0.05; done\n')  # fmt: skip
    env = {"PATH": f"{place.bin}:/usr/bin:/bin", "REAP_PYTHON": str(place.bin / "interpreter")}
    process = subprocess.Popen(["bash", place.folder / "run.sh", "reap"], env=env | {"CALLS": str(place.calls_file)})
    while not place.calls_file.exists() or "started" not in place.calls_file.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait() == 143
    assert "caught" in place.calls_file.read_text()


def test_the_exit_code_is_the_scripts_and_full_stops_there(place):
    place.stub("interpreter", 3)
    assert place.run("test").returncode == 3
    assert place.run("full").returncode == 3
    assert place.calls("interpreter") == ["reap.py"]


def test_full_runs_the_three_steps_in_order(place):
    assert place.run("full").returncode == 0
    assert place.calls("interpreter") == ["reap.py", "prune_model.py", "test_pruned_model.py"]
    assert place.run("full", "--force").returncode == 2


@pytest.mark.parametrize("words", [["nope"], ["--nope", "reap"]])
def test_unknown_words_are_refused_with_2(place, words):
    done = place.run(*words)
    assert done.returncode == 2
    assert "nope" in done.stderr
    assert place.calls("interpreter") == []


def test_docker_asked_for_but_absent(place):
    done = place.run("--docker", "reap")
    assert done.returncode == 4
    assert "does not answer" in done.stderr
    assert place.run("reap", REAP_RUNTIME="podman").returncode == 2


def test_docker_is_taken_when_it_answers(place):
    place.stub("docker")
    done = place.run("reap", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert place.steps() == ["compose run --rm -T reap-cpu python3 reap.py --seed 1"]
    assert "Docker answers" in done.stderr
    place.run("--native", "reap")
    assert place.calls("interpreter") == ["reap.py"]
    place.run("reap", REAP_RUNTIME="native")
    assert place.calls("interpreter") == ["reap.py"]


def test_demo_stays_on_this_machine_unless_docker_is_asked_for(place):
    place.stub("docker")
    place.run("demo")
    assert [call.split()[0] for call in place.calls("interpreter")][:3] == [
        "reap.py",
        "prune_model.py",
        "test_pruned_model.py",
    ]
    assert place.steps() == []
    place.run("--docker", "demo")
    assert len(place.steps()) >= 3


def test_only_steps_that_compute_ask_for_the_gpu(place):
    place.stub("docker")
    place.stub("nvidia-smi")
    for verb, service in (
        ("reap", "reap"),
        ("test", "reap"),
        ("preview", "reap"),
        ("plan", "reap"),
        ("prune", "reap-cpu"),
    ):
        place.run(verb)
        assert f" {service} python3 " in place.steps()[-1]


def test_serve_runs_on_this_machine_and_knows_where_the_server_belongs(place):
    (place.bin / "interpreter").write_text('#!/bin/bash\necho "interpreter $* in $REAP_RUNTIME" >>"$CALLS"\n')
    place.run("serve", "parent", "--serve-port", "9000", "--", "--max-model-len", "128")
    expected = "serve.py parent --serve-port 9000 -- --max-model-len 128 in native"
    assert place.calls("interpreter") == [expected]
    place.stub("docker")
    place.run("serve")
    assert place.calls("interpreter") == ["serve.py in docker"]
    place.run("stop")
    assert place.calls("interpreter") == ["serve.py stop in "]


def test_settings_come_from_dotenv_without_running_it(place, tmp_path):
    trap = tmp_path / "was run"
    lines = (
        "REAP_RUNTIME=native",
        "# REAP_RUNTIME=docker",
        f"REAP_PYTHON=$(touch '{trap}')",
        f"REAP_SEED=`touch '{trap}'`",
    )
    (place.folder / ".env").write_text("\n".join(lines) + "\n")
    place.stub("docker")
    assert place.run("reap").returncode == 0
    assert place.calls("interpreter") == ["reap.py"]  # the environment's REAP_PYTHON beats the file's
    assert not trap.exists()


def test_paths_outside_are_mounted_where_they_are(place, tmp_path):
    place.stub("docker")
    model = tmp_path / "models" / "big"
    model.mkdir(parents=True)
    data = tmp_path / "data.jsonl"
    data.touch()
    (place.folder / ".env").write_text(f"REAP_CALIBRATION_PATH={data}\n")
    place.run("reap", "--model-path", str(model), f"--output-path={tmp_path}/results")
    (call,) = place.steps()
    assert f" -v {model}:{model}:ro " in call
    assert f" -v {data}:{data}:ro " in call
    assert f" -v {tmp_path}/results:{tmp_path}/results " in call
    assert (tmp_path / "results").is_dir()


def test_the_folder_around_a_pruned_model_can_be_written(place, tmp_path):
    place.stub("docker")
    place.run("prune", "--pruned-output-path", str(tmp_path / "new" / "half"))
    assert f" -v {tmp_path}/new:{tmp_path}/new " in place.steps()[0]
    assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new" / "half").exists()


def test_what_lies_in_the_project_or_is_no_path_is_not_mounted(place):
    place.stub("docker")
    place.run("reap", "--model-path", "some/hub-id", "--output-path", "output/here", REAP_CALIBRATION_PATH="run.sh")
    assert " -v " not in place.steps()[0]


def test_every_reap_name_goes_along_so_that_a_misspelt_one_is_refused_inside(place):
    place.stub("docker")
    place.run("reap", REAP_PRUNE_RATOI="0.3", REAP_RUNTIME="docker", HF_TOKEN="hf_canary")
    (call,) = place.steps()
    assert " -e REAP_PRUNE_RATOI " in call
    assert "REAP_RUNTIME" not in call
    assert "hf_canary" not in call


def test_an_old_python_and_a_missing_venv_module_have_clear_lines(place, tmp_path):
    for version in ("", ".14", ".13", ".12", ".11"):
        place.stub(f"python3{version}", 1)
    done = place.run("--native", "reap", REAP_PYTHON="")
    assert (done.returncode, "no Python 3.11 or newer" in done.stderr) == (4, True)
    (place.bin / "python3").write_text("#!/bin/bash\n[[ $2 != *ensurepip* ]]\n")
    done = place.run("--native", "reap", REAP_PYTHON="")
    assert (done.returncode, "has no venv module" in done.stderr) == (4, True)


@pytest.fixture
def fresh(place):
    """A place without .venv, whose python3 makes one out of stubs; `pip` and `torch` behave as the files say."""
    (place.bin / "python3").write_text(f"""#!/bin/bash
[[ $1 == -m && $2 == venv ]] || exit 0
mkdir -p .venv/bin; cp "{place.bin}/venv-python" .venv/bin/python
""")
    (place.bin / "venv-python").write_text(f"""#!/bin/bash
[[ $1 != -c ]] || exit 1  # torch is not there yet
printf 'python %s\\n' "$*" >>"$CALLS"
[[ $* != *+cpu* || ! -e {place.bin}/no-cpu-build ]]
""")
    for name in ("python3", "venv-python"):
        (place.bin / name).chmod(0o755)
    return place


def pip_calls(place) -> list[str]:
    return [call.split("install -qq ")[1] for call in place.calls("python") if "pip install" in call]


def test_a_machine_without_gpu_gets_the_cpu_build_and_the_second_run_installs_nothing(fresh):
    done = fresh.run("--native", "reap", REAP_PYTHON="")
    assert done.returncode == 0, done.stderr
    assert pip_calls(fresh) == ["torch==2.13.0+cpu", "-r requirements.txt"]
    fresh.run("--native", "reap", REAP_PYTHON="")
    assert fresh.calls("python") == ["reap.py"]
    (fresh.folder / "requirements.txt").write_text("numpy\nscipy\n")
    fresh.run("--native", "reap", REAP_PYTHON="")
    assert "-r requirements.txt" in pip_calls(fresh)


def test_without_a_cpu_build_it_warns_before_the_download(fresh):
    (fresh.bin / "no-cpu-build").touch()
    done = fresh.run("--native", "reap", REAP_PYTHON="", REAP_TORCH_INDEX="https://builds.example/cpu")
    assert pip_calls(fresh)[:2] == [
        "--extra-index-url https://builds.example/cpu torch==2.13.0+cpu",
        "--extra-index-url https://builds.example/cpu torch==2.13.0",
    ]
    assert "several GB" in done.stderr


def test_a_gpu_machine_takes_the_standard_build(fresh):
    fresh.stub("nvidia-smi")
    fresh.run("--native", "reap", REAP_PYTHON="")
    assert pip_calls(fresh) == ["torch==2.13.0", "-r requirements.txt"]


def test_the_image_is_built_again_only_when_what_it_is_made_of_changes(place):
    place.stub("docker")
    (place.bin / "docker").write_text(
        '#!/bin/bash\nprintf "docker %s\\n" "$*" >>"$CALLS"\nlabel="${0%/*}/label"\n'
        '[[ $* != image* ]] || cat "$label" 2>/dev/null\n'
        '[[ $* != compose\\ build* ]] || printf "%s" "$BUILT_FROM" >"$label"\n'
    )

    def builds(**environ: str) -> int:
        assert place.run("prune", **environ).returncode == 0
        return sum(call.startswith("compose build") for call in place.calls("docker"))

    assert (builds(), builds()) == (1, 0)
    (place.folder / "requirements.txt").write_text("numpy\nscipy\n")
    assert (builds(), builds()) == (1, 0)
    assert builds(REAP_BASE_IMAGE="another") == 1


def test_build_tells_compose_about_this_machine(place):
    (place.bin / "docker").write_text('#!/bin/bash\necho "$* | $CALLER | $BASE_IMAGE" >>"$CALLS"\n')
    (place.bin / "docker").chmod(0o755)
    assert place.run("build").returncode == 0
    *_, line = place.calls_file.read_text().splitlines(keepends=True)
    assert line == f"compose build reap-cpu | {os.getuid()}:{os.getgid()} | python:3.12-slim\n"
