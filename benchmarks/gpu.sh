#!/usr/bin/env bash
# What needs a GPU, figures first, in under 9 minutes: benchmarks, tests, compute-sanitizer. Needs no network and no
# virtual environment: PYTHON (default python3) with torch, triton, numpy, pytest, rich, matplotlib, hypothesis.
# Usage: benchmarks/gpu.sh [output folder [stage...]]     (default: $OUT, then gpu-out; the first nine stages)
# A stage is one of those below, or full for all of its. Stages that are named share all of the time.
# Leaves summary.txt, logs.tar.gz and results/<device>/<suite>.jsonl; a second run goes on from those rows.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-${OUT:-gpu-out}}
total=${GPU_SH_SECONDS:-510} # the last stage may take 8 more to end, and the summary a few

# Most valuable first, with each stage's share of the time; what one leaves goes to those behind it.
stages=(
    sanity:40 models:170 kernels:40 mlp:20 compiled:115 bits:50 memcheck:25 racecheck:25 initcheck:25
    memory:10 full-kernels:100 full-models:100 full-mlp:60 compile-study:60 max-autotune:100 tests:120
)
asked=("${@:2}")
((${#asked[@]})) || asked=("${stages[@]:0:9}") && asked=("${asked[@]%:*}")

wanted() { # wanted STAGE
    local word
    for word in "${asked[@]}"; do
        [[ $1 == "$word" || $1 == "$word"-* ]] && return
    done
    return 1
}

for word in "${asked[@]}"; do
    [[ " ${stages[*]}" == *" $word:"* || " ${stages[*]}" == *" $word-"* ]] ||
        { echo "gpu.sh: unknown stage $word; choose from full ${stages[*]%:*}" >&2; exit 2; }
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=$(mktemp -d "${TMPDIR:-/tmp}/fusedres-gpu.XXXXXX") || exit 2
trap 'rm -rf "$work"' EXIT
logs=$work/logs
mkdir "$logs"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUTF8=1
# The home folder may not be writable. One cache for all stages: what the tests compiled, the sanitizer need not.
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor CUDA_CACHE_PATH=$work/cuda
export MPLCONFIGDIR=$work/matplotlib HYPOTHESIS_STORAGE_DIRECTORY=$work/hypothesis
unset TRITON_INTERPRET
failed=0
summary=()

remaining() { # remaining STAGE: the shares of it and of those behind it
    local entry sum=0
    for entry in "${stages[@]}"; do
        [[ ${entry%:*} == "$1" || $sum -gt 0 ]] && wanted "${entry%:*}" && ((sum += ${entry#*:}))
    done
    echo "$sum"
}

note() { # note STAGE VERDICT SECONDS REMARK: a line of the summary, saved at once
    [[ $2 == ok ]] || failed=1
    summary+=("$(printf '%-14s %-14s %4d s   %s' "$1" "$2" "$3" "$4")")
    printf '%s\n' "${summary[@]}" >"$out/summary.txt"
    tar -C "$work" -czf "$work/logs.tar.gz" logs && cp "$work/logs.tar.gz" "$out/logs.tar.gz"
}

kernels=$(sed -n 's/^def \(_[a-z0-9_]*_kernel\)(.*/\1/p' fusedres/kernels/*.py | paste -sd '|')

judge() { # judge STAGE STATUS
    local log=$logs/$1.log
    # Not the tool's own exit status: PyTorch and its libraries read padding, too. And not its filter of kernels:
    # initcheck would not see what the kernels that it leaves out write.
    if [[ $1 == *check ]] && grep -Eq "^=+ .*\b($kernels)\b" "$log"; then
        echo "errors found"
    elif (($2 == 124 || $2 == 137)); then
        echo "out of time"
    elif (($2)); then
        echo "failed ($2)"
    elif [[ $1 == *check ]] && ! grep -q "^=.*SUMMARY" "$log"; then
        echo "no report"
    else
        echo ok
    fi
}

stage() { # stage NAME COMMAND...: log to a file, never stop the script
    local name=$1 start=$SECONDS status=0
    shift
    echo "== $name (at most $limit s)"
    timeout --signal=INT --kill-after=8 "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
    tail -n 15 "$logs/$name.log" | cut -c 1-200
    note "$name" "$(judge "$name" "$status")" $((SECONDS - start)) "$name.log"
}

launches="tests/kernels/test_sanitize.py::test_sanitize" # every kernel, in small

sanitize() { # sanitize TOOL
    if [[ -z $sanitizer ]]; then
        note "$1" "not run" 0 "compute-sanitizer was not found"
        return
    fi
    stage "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --target-processes all \
        --show-backtrace no --print-limit 20 "$python" -m pytest -p no:cacheprovider -q "$launches"
}

benchmark() { # benchmark STAGE SUITE OPTION...: rows are saved as they come; what begins last has a quarter
    stage "$1" "$python" -m benchmarks "$2" --device cuda --seconds $((limit * 3 / 4)) --output "$out/results" "${@:3}"
}

if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: $python has no torch that sees a GPU" >&2
    exit 2
fi
missing=$("$python" -c '
import importlib.util as u
print(*[m for m in ("triton", "pytest", "numpy", "rich", "matplotlib", "hypothesis") if u.find_spec(m) is None])')
[[ -z $missing ]] || echo "missing modules, the stages that need them will fail: $missing"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1 || true)
nvidia-smi >"$logs/nvidia-smi.log" 2>&1 || true
# Most of the tests' time is Triton compiling variants, on the CPU: several processes, where xdist is there.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    processors=$(nproc)
    workers=(-n $((processors < 12 ? processors : 12)))
fi

networks=(--full --dtype bfloat16 --workload resnet50 --workload resnet34 --batch 256 --batch 128 --batch 32)
tests=(-m pytest -p no:cacheprovider -q)
# Ordering, streams and graphs, run after run; and in many processes what the sanitizer runs in one.
bits=(tests/kernels/test_{gpu,gpu_join,gpu_linear}.py "$launches")
for entry in "${stages[@]}"; do
    name=${entry%:*}
    wanted "$name" || continue
    limit=$(((total - SECONDS) * ${entry#*:} / $(remaining "$name")))
    ((limit > 0)) || limit=1
    if ((SECONDS >= total)); then
        note "$name" "not run" 0 "no time was left"
        continue
    fi
    case $name in
        sanity) stage sanity "$python" "${tests[@]}" -vv tests/kernels/test_gpu_sanity.py ;; # a line a test
        models) benchmark models models "${networks[@]}" --provider fusedres --provider "fusedres + CUDA graph" ;;
        kernels | mlp) benchmark "$name" "$name" --quick --provider fusedres ;;
        compiled) benchmark compiled models "${networks[@]}" --provider torch.compile ;;
        bits)
            stage bits "$python" "${tests[@]}" ${workers[@]+"${workers[@]}"} "${bits[@]}" \
                -k "bit_for_bit or streams or graph or replays or synchronisation or two_launches or sanitize"
            ;;
        *check) sanitize "$name" ;;
        memory) benchmark memory memory --quick ;;
        full-*) benchmark "$name" "${name#full-}" --full ;;
        max-autotune)
            benchmark "$name" models --quick --provider "torch.compile max-autotune" \
                --provider torch.compile --provider fusedres
            ;;
        tests)
            mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
            stage tests "$python" "${tests[@]}" ${workers[@]+"${workers[@]}"} -m gpu "${files[@]}"
            ;;
        *) benchmark "$name" "$name" --full ;;
    esac
done

printf '\n'
{
    echo "summary: $SECONDS s; logs and rows in $out"
    printf '%s\n' "${summary[@]}"
    "$python" -m benchmarks.reporting.summary "$out/results" 2>&1 | head -n $((59 - ${#summary[@]}))
} | tee "$out/summary.txt"
exit "$failed"
