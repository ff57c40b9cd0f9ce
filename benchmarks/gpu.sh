#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes: tests, compute-sanitizer, benchmarks. Needs no network and no
# virtual environment: PYTHON (default python3) with torch, triton, numpy, pytest, rich, matplotlib, scikit-learn.
# Usage: benchmarks/gpu.sh [output folder [stage...]]     (default: $OUT, then gpu-out; all stages)
# Stages: tests, memcheck, racecheck, mlp, models. A benchmark that is run alone gets all of the time.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-${OUT:-gpu-out}}
mkdir -p "$out"
out=$(cd "$out" && pwd)
asked=" ${*:2} "
for name in $asked; do
    [[ " tests memcheck racecheck mlp models " == *" $name "* ]] || { echo "gpu.sh: unknown stage $name" >&2; exit 2; }
done
total=530
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
failed=0
summary=()

wanted() { # wanted NAME
    [[ $asked == "  " || $asked == *" $1 "* ]]
}

stage() { # stage NAME SECONDS COMMAND...: log to a file, never stop the script
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    wanted "$name" || return 0
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    tail -n 15 "$out/$name.log"
    local verdict="ok"
    if ((status == 124 || status == 137)); then
        verdict="out of time"
    elif ((status != 0)); then
        verdict="failed ($status)"
    fi
    [[ $verdict == ok ]] || failed=1
    summary+=("$(printf '%-12s %-14s %4d s   %s' "$name" "$verdict" $((SECONDS - start)) "$name.log")")
}

skip() { # skip NAME REASON: a check that could not run is not a check that passed
    wanted "$1" || return 0
    summary+=("$(printf '%-12s %-14s %4d s   %s' "$1" "not run" 0 "$2")")
    failed=1
}

sanitize() { # sanitize TOOL SECONDS
    if [[ -n $sanitizer ]]; then
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$1" "$2" "$sanitizer" --tool "$1" --error-exitcode 86 \
            --target-processes all "$python" -m pytest -p no:cacheprovider -x -q -m gpu -k sanitize tests
    else
        skip "$1" "compute-sanitizer was not found"
    fi
}

benchmark() { # benchmark SUITE SECONDS LONGEST: the last of what it begins may take LONGEST; rows are saved as they come
    stage "$1" "$2" "$python" -m benchmarks "$1" --device cuda --seconds $(($2 - $3)) --results "$out/results"
}

if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: $python has no torch that sees a GPU" >&2
    exit 2
fi
missing=$("$python" -c '
import importlib.util as u
print(*[m for m in ("pytest", "numpy", "rich", "matplotlib", "sklearn", "hypothesis") if u.find_spec(m) is None])')
[[ -z $missing ]] || echo "missing modules, the stages that need them will fail: $missing"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1 || true)

nvidia-smi >"$out/nvidia-smi.log" 2>&1 || true
# Most of the tests' time is Triton compiling variants, on the CPU: several processes, where xdist is there.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
stage tests 160 "$python" -m pytest -p no:cacheprovider -q "${workers[@]}" -m gpu tests
sanitize memcheck 70
sanitize racecheck 70
if wanted models; then
    benchmark mlp $(((total - SECONDS) * 2 / 5)) 30
else
    benchmark mlp $((total - SECONDS)) 30
fi
benchmark models $((total - SECONDS)) 70

printf '\n%s\n' "summary ($SECONDS s, logs and rows in $out)" "${summary[@]}"
exit "$failed"
