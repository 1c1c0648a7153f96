#!/usr/bin/env bash
# Make a Mixture-of-Experts model smaller: score its experts, cut the least useful, judge the result.
#
# This file only decides WHERE a step runs (container or this machine) and sets that place up.
# What a step does, and every setting it reads, is in the Python scripts. `./run.sh help` lists the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
container=moeprune-$$
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # spinning threads cost up to 10x where cores are shared
torch_version=2.13.0

usage() {
  cat <<'TEXT'
Usage: ./run.sh [--docker | --native] COMMAND [ARGS...]

  demo     score, halve and judge the small model in demo/: the whole flow in about two minutes

Steps (ARGS go to the script unchanged; `./run.sh reap --help` lists them):
  reap     score the experts        -> output/reap_metadata.json
  preview  show what each cut would lose, before anything is written
  prune    write the smaller model  -> output/<name>/           (needs no GPU)
  test     judge it by its parent   -> output/test_report.json
  full     reap, prune and test with the settings of .env and the environment; finished steps are skipped
  combine  add up the scores of several runs
  serve    serve the pruned model (or: serve parent) with vLLM; stop ends it
  batch    send many prompts to a server and keep every answer

Around the steps:
  plan     say what each step would take, also of a model that is not downloaded
  doctor   say what this machine has, what is missing and what to do
  build    build the container image
  shell    open a shell where the steps run
  check    linters, types and all tests
  engines  vLLM, llama.cpp, MLX and quantization libraries load cut models and answer (several GB)
  help     this text

Where a step runs: --docker, --native, or REAP_RUNTIME=docker|native|auto. auto (the default) takes Docker when it
answers, else this machine with a .venv of its own; demo stays on this machine unless Docker is asked for.
Settings: ARGS, the environment, or .env (see .env.example). Paths are relative to the folder of run.sh.
TEXT
}

say() { printf 'run.sh: %s\n' "$*" >&2; }
die() {
  say "$1"
  exit "${2:-2}"
}

# setting NAME: from the environment, else from .env, which is read and never run.
setting() {
  local from_file=""
  [[ ! -f .env ]] || from_file=$(tr -d '\r' <.env | sed -n "s/^$1=//p" | tail -n 1)
  printf '%s' "${!1:-$from_file}"
}

have_docker() { docker compose version && docker info; } >/dev/null 2>&1
have_gpu() { nvidia-smi -L; } >/dev/null 2>&1

# Sets `runtime`, once: an exit inside $(...) would not stop this script.
choose_runtime() {
  [[ -n $runtime ]] || runtime=$(setting REAP_RUNTIME)
  case ${runtime:=auto} in
    native) ;;
    docker) have_docker || die "Docker was asked for, but 'docker compose' does not answer; see ./run.sh doctor" 4 ;;
    auto)
      runtime=native
      if [[ $1 == demo ]]; then
        say "running on this machine (--docker runs in the container)"
      elif have_docker; then
        runtime=docker
        say "Docker answers: running in the container (--native runs on this machine)"
      else
        say "no Docker here: running on this machine"
      fi
      ;;
    *) die "REAP_RUNTIME must be docker, native or auto, not '$runtime'" ;;
  esac
}

# --- this machine ---------------------------------------------------------------------------------------------------

# set_up REQUIREMENTS: sets `python` to REAP_PYTHON as it is, else to a .venv that holds the requirements.
set_up() {
  python=$(setting REAP_PYTHON)
  if [[ -n $python ]]; then
    command -v "$python" >/dev/null || die "REAP_PYTHON names no program: $python; leave it empty for a .venv set up here"
    return 0
  fi
  python=.venv/bin/python
  local stamp=.venv/set-up-$1 wanted
  wanted=$(cat requirements.txt "$1" | cksum)
  [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]] || return 0
  say "setting up .venv from $1 (later runs skip this)"
  [[ -x $python ]] || make_venv
  "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' || install_torch
  "$python" -m pip install -qq -r "$1" || die "pip could not install $1; see the lines above" 4
  printf '%s\n' "$wanted" >"$stamp"
}

make_venv() {
  find_python
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" 4
  "$python" -m venv .venv
  python=.venv/bin/python
}

find_python() { # sets `python`
  for python in python3 python3.14 python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
  done
  die "no Python 3.11 or newer found; install one, or name one that has the requirements in REAP_PYTHON" 4
}

# The standard Linux build of torch brings gigabytes of GPU libraries: a machine without a GPU asks for the CPU build.
install_torch() {
  local from
  from=$(setting REAP_TORCH_INDEX)
  local pip=("$python" -m pip install -qq ${from:+--extra-index-url "$from"})
  if [[ $(uname -s) == Linux ]] && ! have_gpu; then
    say "no GPU here: installing the CPU build of torch $torch_version"
    "${pip[@]}" "torch==$torch_version+cpu" 2>/dev/null && return
    say "the package index has no CPU build for this Python: taking the standard one, which is several GB"
    say "(stop here and name an index that has CPU builds in REAP_TORCH_INDEX to avoid that; see docs/installation.md)"
  fi
  "${pip[@]}" "torch==$torch_version" || die "pip could not install torch; see the lines above" 4
}

# --- container ------------------------------------------------------------------------------------------------------

# The GPU service asks for a GPU and fails without one.
service() { if [[ $1 == @(prune|combine|batch) ]] || ! have_gpu; then echo reap-cpu; else echo reap; fi; }

# The names of settings in the environment and in .env, without those that only this file reads.
step_names() {
  env | cat - .env 2>/dev/null | sed -n 's/^\(REAP_[A-Za-z0-9_]*\)=.*/\1/p' | sort -u |
    grep -vxE 'REAP_(RUNTIME|PYTHON|TORCH_INDEX|BASE_IMAGE)' || true
}

# Sets `mounts`: a path means the same inside and outside, so whatever ARGS and settings name outside of this folder is
# mounted where it is; only where results go can be written.
mount_paths() {
  local word path name flag=""
  mounts=()
  for name in $(step_names); do
    set -- "$@" "--$name=$(setting "$name")"
  done
  for word in "$@"; do
    if [[ $word == --*=* ]]; then flag=${word%%=*} word=${word#*=}; fi
    path=$(realpath -ms -- "${word:-.}")
    case $flag in
      --output-path | --REAP_OUTPUT_PATH) writable "$path" "$path" ;;
      --pruned-output-path | --REAP_PRUNED_OUTPUT_PATH) writable "$path" "$(dirname "$path")" ;;
      *) [[ $path == "$PWD" || $path == "$PWD"/* || ! -e $path ]] || add_mount "$path" ":ro" ;;
    esac
    flag=$word
  done
}

# writable PATH FOLDER: PATH will be written in FOLDER, which is made as this user (Docker would make it as root).
writable() {
  [[ $1 != "$PWD" && $1 != "$PWD/output" && $1 != "$PWD"/output/* ]] || return 0
  mkdir -p "$2"
  add_mount "$2" ""
}

add_mount() { [[ " ${mounts[*]} " == *" $1:$1$2 "* ]] || mounts+=(-v "$1:$1$2"); }

# Sets `cmd` to the command in the container. Every REAP_ name goes along, so that a misspelt one is refused there too.
in_container() {
  local what=$1 name
  shift
  mount_paths "$@"
  cmd=(docker compose run --rm --name "$container")
  [[ -t 0 && -t 1 ]] || cmd+=(-T)
  for name in $(step_names); do
    [[ -z ${!name+set} ]] || cmd+=(-e "$name")
  done
  cmd+=("${mounts[@]}" "$(service "$what")" "$@")
}

# Without a terminal, a signal ends `docker compose run` and leaves the container running, so this stops it first.
await_container() {
  local status=0 child
  "${cmd[@]}" <&0 &
  child=$!
  trap 'docker stop --time 60 "$container" >/dev/null 2>&1' INT TERM
  wait "$child" || status=$?
  trap - INT TERM
  wait "$child" 2>/dev/null || true
  docker rm --force "$container" >/dev/null 2>&1 || true
  return "$status"
}

# What docker-compose.yml needs to know of this machine.
compose_environment() {
  HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
  BASE_IMAGE=$(setting REAP_BASE_IMAGE)
  have_gpu || BASE_IMAGE=${BASE_IMAGE:-python:3.12-slim}
  CALLER=$(id -u):$(id -g)
  BUILT_FROM="$BASE_IMAGE $(cat Dockerfile requirements.txt | cksum)"
  export HF_HOME BASE_IMAGE CALLER BUILT_FROM
  mkdir -p output "$HF_HOME"
}

build() { docker compose build "$@" reap-cpu >&2; } # both services use this image

# The code is mounted, so only what the image was built from can grow old.
build_if_old() {
  local label='{{index .Config.Labels "built_from"}}'
  [[ $(docker image inspect --format "$label" moeprune 2>/dev/null) != "$BUILT_FROM" ]] || return 0
  say "building the image moeprune (again when requirements, Dockerfile or base image change)"
  build || die "the image could not be built; see the lines above" 4
}

# --- steps ----------------------------------------------------------------------------------------------------------

# step WHAT CMD...: run CMD where steps run; `python` as its first word is the interpreter of that place.
step() {
  local what=$1 cmd
  shift
  if [[ $runtime == docker ]]; then
    [[ $1 != python ]] || set -- python3 "${@:2}"
    in_container "$what" "$@"
  else
    [[ $1 != python ]] || set -- "$python" "${@:2}"
    cmd=("$@")
  fi
  say "+ $(printf '%q ' "${cmd[@]}")"
  if [[ $runtime == docker && ! -t 0 ]]; then
    await_container
  elif [[ $command == @(full|demo) ]]; then
    "${cmd[@]}"
  else
    exec "${cmd[@]}" # so that a signal to this script reaches the step
  fi
}

# Every path is given, so that no setting of the user can point it elsewhere. So small a model has hardly an expert to
# spare: it may lose half of its right answers, and says so.
demo() {
  local in=(--model-path demo/model --output-path output/demo) pruned=(--pruned-output-path output/demo/pruned) status=0
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # so small a model only waits for a second thread
  step reap python reap.py "${in[@]}" --calibration-path demo/calibration.jsonl
  step prune python prune_model.py "${in[@]}" "${pruned[@]}" --prune-ratio 0.5
  step test python test_pruned_model.py "${in[@]}" "${pruned[@]}" --evaluation-path demo/evaluation.jsonl --min-answers 0.5 || status=$?
  [[ $status != 0 && $status != 5 ]] || step prune python -m moeprune.summary output/demo # 5: judged, and found wanting
  return "$status"
}

check() {
  local failed="" bin
  set_up requirements-dev.txt
  bin=$(dirname "$(command -v "$python")")
  try() { say "+ $*" && "$@" || failed+=$'\n  '"$*"; }
  try "$bin/ruff" check .
  try "$bin/ruff" format --check .
  try "$bin/mypy"
  try "$bin/shellcheck" run.sh .ci/run
  try "$bin/shfmt" -d -i 2 -ci run.sh .ci/run
  try "$bin/hadolint" Dockerfile
  if docker compose version >/dev/null 2>&1; then
    compose_environment
    try docker compose config --quiet
  else
    say "no docker compose here, so docker-compose.yml is only checked by the tests"
  fi
  try env OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist loadfile -rs "$@"
  [[ -z $failed ]] || die "check failed:$failed" 1
}

# on_host CMD...: with any Python that this machine has; nothing needs to be set up for it.
on_host() {
  python=$(setting REAP_PYTHON)
  [[ -n $python || ! -x .venv/bin/python ]] || python=.venv/bin/python
  [[ -n $python ]] || find_python
  [[ -z $runtime ]] || export REAP_RUNTIME=$runtime
  "$python" "$@"
}

main() {
  runtime=""
  while [[ ${1:-} == --* ]]; do
    case $1 in
      --docker) runtime=docker ;;
      --native) runtime=native ;;
      --help) set -- help ;;
      *) die "unknown option $1; ./run.sh help lists the commands" ;;
    esac
    [[ $1 == help ]] || shift
  done
  command=${1:-help}
  shift || true
  [[ $# -eq 0 || $command != @(full|demo) ]] ||
    die "$command takes no arguments; put settings in .env or before it: REAP_SEED=1 ./run.sh $command"
  case $command in
    plan | reap | preview | prune | test | full | combine | batch | demo | shell)
      choose_runtime "$command"
      if [[ $runtime == native ]]; then
        set_up requirements.txt
      else
        compose_environment
        build_if_old
      fi
      ;;
  esac
  case $command in
    plan) step plan python plan.py "$@" ;;
    reap) step reap python reap.py "$@" ;;
    preview) step preview python preview.py "$@" ;;
    prune) step prune python prune_model.py "$@" ;;
    test) step test python test_pruned_model.py "$@" ;;
    combine) step combine python combine.py "$@" ;;
    batch) step batch python batch.py "$@" ;;
    full)
      step reap python reap.py
      step prune python prune_model.py
      step test python test_pruned_model.py
      ;;
    demo) demo ;;
    check) check "$@" ;;
    engines)
      set_up requirements-dev.txt
      "$python" -m tests.engines.run "$@"
      ;;
    build)
      compose_environment
      build "$@"
      ;;
    shell)
      [[ $runtime == docker ]] || export PATH="$PWD/.venv/bin:$PATH"
      step shell bash "$@"
      ;;
    serve)
      choose_runtime serve
      [[ $runtime != docker ]] || compose_environment
      on_host serve.py "$@"
      ;;
    stop)
      compose_environment
      on_host serve.py stop "$@"
      ;;
    doctor) on_host -m moeprune.doctor "$@" ;;
    help | -h) usage ;;
    *) die "unknown command '$command'; ./run.sh help lists the commands" ;;
  esac
}

main "$@"
