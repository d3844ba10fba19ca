#!/usr/bin/env bash
# Every test that needs a GPU, side by side on one: does this tree work there?
#
#     tests/gpu.sh [FOLDER [SECONDS]]               by default runs/gpu-tests, 230
#     MARKS="gpu and not slow" tests/gpu.sh         without those that also take minutes of a CPU
#     tests/gpu.sh runs/dry 60 --collect-only       what would run, on any machine
#
# Each process has one file of tests, or a case of one that takes long, and a log FOLDER/NAME.log.
# At the end stand their results and seconds. What is not through after SECONDS is stopped, and
# counts as failed.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/gpu-tests}
seconds=${2:-230}
shift $(($# < 2 ? $# : 2))
flags=(-p no:cacheprovider -s -rs --durations=5 "$@")
mkdir -p "$folder"
rm -f "$folder"/*.log "$folder"/*.result
export PYTHONUNBUFFERED=1

job() { # name, arguments of pytest
    local log=$folder/$1.log result=$folder/$1.result code
    shift
    (
        timeout --kill-after=5 "$seconds" python3 -m pytest "$@" "${flags[@]}" >"$log" 2>&1
        code=$?
        echo "$code $SECONDS $(tail -n 1 "$log")" >"$result"
    ) &
}

marked=(-m "${MARKS:-gpu}")
# The longest first: the scripts run on one core of the CPU, too.
scripts=(cpt-cuda-fp32 cpt-cuda-bf16 sft-cuda dpo-cuda evaluation asked_to_end decoder)
for case in "${scripts[@]}"; do
    job "script-$case" tests/stages/test_scripts_gpu.py "${marked[@]}" -k "$case"
done
for tool in racecheck memcheck; do
    job "sanitizer-$tool" tests/kernels/test_sanitizer_gpu.py "${marked[@]}" -k $tool
done
for file in kernels/test_flash_attention_gpu kernels/test_kernels_gpu training/test_run_gpu \
    training/test_alone; do
    job "${file#*/test_}" "tests/$file.py" "${marked[@]}"
done
# Where there is a GPU, these run on it and not in Triton's interpreter. What they count in machine
# code that is compiled for it needs none.
for name in flash_attention kernels_triton split_adamw kernels; do
    job "either-$name" "tests/kernels/test_$name.py" -m "not gpu and not slow" -k "not compiled"
done
wait

bad=0
for result in "$folder"/*.result; do
    read -r code took said <"$result"
    case $code in
        0) verdict=passed ;;
        5) verdict="has no such test" ;;
        124 | 137) verdict="STOPPED at its limit" ;;
        *) verdict=FAILED ;;
    esac
    [[ $code == 0 && " $said" != *" passed"* ]] && verdict="nothing ran"
    [[ $code == 0 || ($code == 5 && -n ${MARKS:-}) ]] || bad=1
    printf '%-24s %-20s %4s s  %s\n' "$(basename "$result" .result)" "$verdict" "$took" "$said"
done >"$folder/results.txt"
for log in "$folder"/*.log; do # why it was skipped, what failed, what a test says of its run
    grep -hE "^(SKIPPED|FAILED|ERROR)|^E   |bits$" "$log" | cut -c1-300 | head -n 12 |
        sed "s|^|$(basename "$log" .log): |"
done
cat "$folder/results.txt"
exit "$bad"
