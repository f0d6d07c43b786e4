#!/usr/bin/env bash
# What only a GPU can show, most important first; under 25 minutes on one card, without network.
#
#   source .venv/bin/activate; tests/gpu_day_one.sh          (./run.sh has made .venv before)
#   tests/gpu_day_one.sh --dry                               what would run
#
# Each check names what its output must hold. A failed one does not stop the others; logs are kept.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

gpus=0
if [ "${CUDA_VISIBLE_DEVICES-all}" != "" ] && command -v nvidia-smi >/dev/null; then
    gpus="$(nvidia-smi -L | grep -c '^GPU ')"
fi
is_dry=false
if [ "$gpus" = 0 ] || [ "${1:-}" = --dry ]; then
    is_dry=true
fi
logs="${TMPDIR:-/tmp}/gpu_day_one.$$"
number=0 failed=0

# check GPUS SECONDS NAME EXPECTED COMMAND...
check() {
    local needed="$1" limit="$2" name="$3" expected="$4" log
    shift 4
    number=$((number + 1))
    if $is_dry; then
        printf '%s GPU\t%s s\t%s\tmust print: %s\t%s\n' "$needed" "$limit" "$name" "$expected" "$*"
        command -v "$1" >/dev/null || failed=$((failed + 1))
        return
    fi
    if [ "$gpus" -lt "$needed" ]; then
        echo "$number. $name: skipped, needs $needed GPUs"
        return
    fi
    log="$logs/$number.log"
    SECONDS=0
    if timeout "$limit" "$@" >"$log" 2>&1 && grep -Eq "$expected" "$log"; then
        echo "$number. $name: ok, ${SECONDS} s: $(grep -E "$expected" "$log" | tail -n 1)"
    else
        failed=$((failed + 1))
        echo "$number. $name: FAILED after ${SECONDS} s, see $log: $(tail -n 1 "$log")"
    fi
}

# train GPUS SECONDS NAME EXPECTED FOLDER SETTING...: the tiny model, in bfloat16
train() {
    local needed="$1" limit="$2" name="$3" expected="$4" folder="$5" launch=(python)
    shift 5
    if [ "$needed" -gt 1 ]; then
        launch=(torchrun --standalone --nproc_per_node "$needed")
    fi
    check "$needed" "$limit" "$name" "$expected" "${launch[@]}" ghpo.py --config configs/tiny.yaml \
        "output_dir=$logs/$folder" eval_strategy=no start_hint_step=0 torch_dtype=bfloat16 "$@"
}

$is_dry || mkdir -p "$logs"

check 1 30 "gcc and Python.h, for Triton" "Python.h: yes" bash -c 'gcc --version | head -n 1 &&
    test -f "$(python -c "import sysconfig; print(sysconfig.get_path(\"include\"))")/Python.h" &&
    echo "Python.h: yes"'
check 1 60 "torch, vLLM, card, driver" "compute capability" python -c 'import torch, vllm
print(torch.__version__, "CUDA", torch.version.cuda, vllm.__version__, torch.cuda.get_device_name(),
      "compute capability", torch.cuda.get_device_capability())'
check 1 90 "varlen scores packed rows as alone" "varlen is right" python tests/gpu_varlen.py
train 1 150 "training in packed rows, engine hf" "done: " hf \
    engine=hf attn_implementation=varlen max_steps=3
# The program ends a run by itself when k3 of sampler against trainer passes 1e-2 (float32: 1e-4):
# stale weights, or garbage after sleep level 2.
train 1 240 "vLLM follows the weights, asleep in between" "done: " vllm \
    engine=vllm attn_implementation=varlen max_steps=8 save_steps=4
train 1 180 "the same in float32: k3 below 1e-4" "done: " float32 \
    engine=vllm torch_dtype=float32 max_steps=4
train 1 180 "the run goes on from its checkpoint" "resuming .*checkpoint-000008" vllm \
    engine=vllm attn_implementation=varlen max_steps=10 save_steps=4
train 1 150 "weights and Adam in the host's memory" "done: " offload \
    engine=vllm cpu_offload=true max_steps=2
check 1 420 "memory and speed at 1.5 B (48 GB; the table is in the log)" "tokens_trained_per_s" \
    python tests/bench_gpu.py --steps 2 --sides packed
train 2 240 "two ranks, an engine each" "done: " ranks engine=vllm sharding=zero3 max_steps=4
check 2 420 "a server on the second GPU, weights by NCCL" "done: " bash -c '
    CUDA_VISIBLE_DEVICES=1 python -m configs.plan serve configs/tiny.yaml torch_dtype=bfloat16 &
    trap "kill $!" EXIT
    until (: </dev/tcp/127.0.0.1/8000) 2>/dev/null; do kill -0 $! || exit 1; sleep 1; done
    CUDA_VISIBLE_DEVICES=0 python ghpo.py --config configs/tiny.yaml output_dir="$0" \
        eval_strategy=no engine=server torch_dtype=bfloat16 max_steps=4' "$logs/server"

if $is_dry; then
    [ "$gpus" != 0 ] || echo "no GPU: skipped"
else
    echo "$failed of $number checks failed; logs: $logs"
fi
exit "$((failed > 0))"
