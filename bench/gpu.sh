#!/usr/bin/env bash
# Everything worth measuring on one GPU, in at most nine and a half minutes: is it right, how fast is
# the step, then why.
#
#     bench/gpu.sh [FOLDER [SECONDS [FLAGS...]]]        by default runs/gpu, 560
#     bench/gpu.sh runs/dry 120 --device cpu --quick --tokens 256        the same parts on a CPU
#     ONLY="ceilings attention" bench/gpu.sh                             some parts alone
#
# FOLDER/gpu.log has the output, FOLDER/gpu.jsonl every measurement as soon as it is taken. A part
# that runs into its limit is stopped, one with too little time left is skipped, one that fails does
# not stop the next; all of it is said.
# Afterwards: cp FOLDER/gpu.jsonl bench/results/NAME.jsonl && python -m bench.results
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/gpu}
seconds=${2:-560}
shift $(($# < 2 ? $# : 2))
flags=("$@" --results "$folder/gpu.jsonl")
mkdir -p "$folder"
log=$folder/gpu.log
failed=()

part() { # name, seconds that it needs at least, seconds that it may take, command...
    local name=$1 least=$2 most=$3 left=$((seconds - SECONDS)) started=$SECONDS code
    shift 3
    [[ -n ${ONLY:-} && " $ONLY " != *" ${name// /-} "* ]] && return
    if ((left < least)); then
        echo "== $name: skipped, $left s are left and it needs $least" | tee -a "$log"
        failed+=("$name (skipped)")
        return
    fi
    echo "== $name, at most $((most < left ? most : left)) s: $*" | tee -a "$log"
    PYTHONUNBUFFERED=1 timeout --kill-after=5 $((most < left ? most : left)) "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    ((code == 124 || code == 137)) && echo "== $name: stopped at its limit" | tee -a "$log"
    ((code)) && failed+=("$name (exit $code)")
    echo "== $name took $((SECONDS - started)) s" | tee -a "$log"
    ((code == 0 || code == 124 || code == 137)) # false: it broke, and not for want of time
}

export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # 122 GiB of states leave little for gaps
step=(python3 -m bench.step_gpu --tokens 4096)
part machine 5 30 python3 -m bench.measure
part tests 20 110 env MARKS="gpu and not slow" tests/gpu.sh "$folder/tests" 100
part ceilings 15 40 python3 -m bench.ceilings --tokens 8192 "${flags[@]}"
part step 60 100 "${step[@]}" --only cpt sft dpo --optimizer split "${flags[@]}" ||
    part "step without Triton" 60 100 "${step[@]}" --only sft --kernels reference "${flags[@]}"
part "step, bf16 moments" 60 110 "${step[@]}" 8192 --only cpt sft --optimizer split_bf16 "${flags[@]}"
part "step, FSDP" 30 60 "${step[@]}" --only sft --optimizer fsdp "${flags[@]}"
part attention 20 60 python3 -m bench.kernels --ops attention --tokens 4096 8192 "${flags[@]}"
part kernels 30 110 python3 -m bench.kernels --ops rmsnorm linear_nll swiglu rope --tokens 8192 \
    "${flags[@]}"
part layer 20 45 python3 -m bench.kernels --ops layer --tokens 8192 "${flags[@]}"
part growth 30 75 "${step[@]}" --only scaling fsdp "${flags[@]}"
part rows 30 120 python3 -m bench.kernels --ops attention rmsnorm swiglu rope linear_nll \
    --tokens 32768 "${flags[@]}"
part "step, host memory" 60 100 "${step[@]}" --only sft --optimizer split_host "${flags[@]}"
part rivals 90 170 python3 -m bench.step_rivals "${flags[@]}"

if ((${#failed[@]})); then
    echo "== not whole: ${failed[*]}" | tee -a "$log"
    exit 1
fi
