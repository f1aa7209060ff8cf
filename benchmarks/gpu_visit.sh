#!/usr/bin/env bash
# One visit to a machine with a GPU, in one call of at most 9 minutes:
#   bash benchmarks/gpu_visit.sh OUT_DIR [quick|full|training]
# Installs, tests on the GPU, checks memory, measures the ceilings, runs the benchmarks and makes the
# report.
# A step that fails or runs out of time stops nothing; the summary at the end says which did.
# "training" is a visit for the models: their rows, compiled side by side in torch's default mode and
# timed in turns, and a small DFM trained meanwhile on photographs; in place of tests, memcheck,
# photographs and the other rows.
# With no GPU (or --dry-run as third argument) it runs the same steps on the CPU, cut short.
# SKIP="tests memcheck" leaves steps out; with SKIP=benchmarks and then SKIP=tests a full set of rows
# has two visits' time. TESTS and ROWS are pytest's -k of them, SECONDS_OF_ROW the timing of each,
# OPTIONS more of the benchmarks', such as --no-compile: a compiled form takes 2 to 16 s, one of a model
# minutes.
# DFM_FAST_COMMIT names the commit where the folder is no git repository.
set -uo pipefail

out=${1:?usage: gpu_visit.sh OUT_DIR [quick|full|training] [--dry-run]}
rows=${2:-quick}
mode=${3:-}
[ "$rows" = training ] && SKIP="tests memcheck photographs ${SKIP:-}"
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$out/visit.log summary=$out/summary.txt
: >"$log" && : >"$summary"
deadline=$((SECONDS + ${VISIT_SECONDS:-530}))
failed=0

gpu=1
command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || gpu=0
[ "$mode" = --dry-run ] && gpu=0
device=cuda
[ "$gpu" = 1 ] || device=cpu
export PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX=$work/pycache

note() { printf '%-12s %s\n' "$1" "$2" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: under its own time limit, and never past the deadline of the visit.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS own=$work/$1.log code verdict
    shift 2
    rm -f "$own"
    case " ${SKIP:-} " in
        *" $name "*) note "$name" "skipped as asked" && return 0 ;;
    esac
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        note "$name" "SKIPPED: no time left"
        failed=1
        return 1
    fi
    printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
    # Interrupted, pytest still says what failed.
    timeout --signal=INT --kill-after=15 "$limit" "$@" >"$own" 2>&1
    code=$?
    cat "$own" >>"$log"
    case $code in
        0) verdict=ok ;;
        124 | 137) verdict="TIME OUT after $limit s" ;;
        *) verdict="FAILED with $code: $(grep -v '^[[:space:]]*$' "$own" | tail -n 1 | cut -c1-150)" ;;
    esac
    [ "$code" = 0 ] || failed=1
    note "$name" "$verdict ($((SECONDS - start)) s)"
    return "$code"
}

facts() {
    [ "$gpu" = 1 ] && nvidia-smi
    "$python" -c '
import torch, platform
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
import triton; print("triton", triton.__version__)'
    command -v nvcc >/dev/null && nvcc --version | tail -n 1
    command -v compute-sanitizer >/dev/null && compute-sanitizer --version | tail -n 1
    return 0
}

install_package() {
    if compgen -G '.whl/*.whl' >/dev/null; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/site \
            .whl/*.whl || return
    fi
    DFM_FAST_NO_EXT=1 "$python" -m pip install -q --no-index --no-build-isolation --no-deps -e .
}

# Of the extensions only the CUDA one, meanwhile: nothing but large pyramids waits for it.
build() {
    suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    [ -e "dfm_fast/_C_cuda$suffix" ] ||
        DFM_FAST_BUILDS=_C_cuda "$python" setup.py build_ext --inplace >"$work/build.log" 2>&1
    echo $? >"$work/built"
}

built() {
    while [ ! -e "$work/built" ]; do sleep 0.2; done
    cat "$work/build.log" 2>/dev/null
    return "$(cat "$work/built")"
}

ceilings() {
    "$python" -m benchmarks.ceilings --device "$device"
}

memcheck() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m benchmarks.smoke "$device"
}

export -f facts install_package built ceilings memcheck
export python gpu device work

[ "$gpu" = 1 ] || note visit "no GPU: the same steps on the CPU, cut short"
step facts 30 bash -c facts
if [ "$mode" = --dry-run ]; then
    note install "skipped: dry run"
else
    step install 60 bash -c install_package
fi
[ -d /tmp/site ] && export PYTHONPATH=/tmp/site${PYTHONPATH:+:$PYTHONPATH}
step import 60 "$python" -c 'import dfm_fast; print(dfm_fast.__version__)'
if [ "$gpu" = 1 ]; then
    build &
    tests=(-m pytest tests -q --tb=short -p no:cacheprovider --continue-on-collection-errors)
    "$python" -c 'import xdist' 2>/dev/null && tests+=(-n 14 --dist worksteal)
    selected="(cuda or tf32_is_allowed or replay_with or few_programs) and not cuda_sources"
    export OMP_NUM_THREADS=1
    step tests 170 "$python" "${tests[@]}" -k "${TESTS:-$selected}"
    cp "$work/tests.log" "$out/tests.log" 2>/dev/null
    step build 120 bash -c built
    step cuda-tests 60 "$python" "${tests[@]}" -k "cuda and (laplacian or haar) and not cuda_sources"
    cat "$work/cuda-tests.log" >>"$out/tests.log" 2>/dev/null
    unset OMP_NUM_THREADS
else
    step smoke 60 "$python" -m benchmarks.smoke "$device"
    step tests 60 "$python" -m pytest tests/test_harness.py tests/test_report.py -q -p no:cacheprovider
    cp "$work/tests.log" "$out/tests.log" 2>/dev/null
fi
if [ "$gpu" = 1 ] && command -v compute-sanitizer >/dev/null; then
    step memcheck 75 bash -c memcheck
else
    note memcheck "skipped: no compute-sanitizer or no GPU"
fi
step ceilings 40 bash -c ceilings
options=(--benchmark-only --results "$work/results" -p no:cacheprovider)
[ "$rows" = quick ] || options+=(--full)
[ -z "${OPTIONS:-}" ] || options+=($OPTIONS)
if [ "$gpu" = 1 ]; then
    [ -z "${ROWS:-}" ] || options+=(-k "$ROWS")
    options+=(--seconds "${SECONDS_OF_ROW:-0.5}")
else
    options+=(--device cpu --seconds 0.1)
    options+=(-k "haar_build or video or (dfm_s_256 and forward and not sampling)")
fi
step photographs 40 "$python" -m benchmarks.photographs --out "$work/results/photographs" \
    --device "$device"
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$work/inductor}
if [ "$rows" = training ]; then
    models=("dfm_xl_512 and training" "dfm_xl_512 and steps_30" "snapgen_1024 and cached and not _8")
    compared=(photos --steps 2000)
    more=(--seconds 0.5)
    if [ "$gpu" = 0 ]; then
        models=("dfm_s_256 and forward and not sampling")
        compared=(digits --steps 2 --batch 8 --samples 32)
        more=(--seconds 0.1 --device cpu)
    fi
    step comparison 150 "$python" -m benchmarks.dfm_against_flow_matching "${compared[@]}" \
        --seeds 1 --points 1 --device "$device" --out "$work/comparison" &
    TORCHINDUCTOR_COMPILE_THREADS=4 step benchmarks $((deadline - SECONDS - 25)) \
        "$python" -m benchmarks.turns "${models[@]}" --until 170 --compile-mode default \
        --results "$work/results" "${more[@]}"
    wait
    cp "$work"/comparison/*.json "$out/" 2>/dev/null
else
    # They write their results row by row: what the time limit cuts off is the last rows.
    step benchmarks $((deadline - SECONDS - 25)) "$python" -m pytest benchmarks/ "${options[@]}"
fi
cp "$work/benchmarks.log" "$out/benchmarks.log" 2>/dev/null
step report 25 "$python" -c 'import sys; from dfm_fast.cli import main; sys.exit(main(sys.argv[1:]))' \
    report "$work/results" --out "$work/results/report"
cp "$work/results/report/index.html" "$out/report.html" 2>/dev/null
cp "$work/results/report/report.md" "$out/report.md" 2>/dev/null
[ -d "$work/results" ] && tar -C "$work/results" -czf "$out/results.tar.gz" .
gzip -f "$log"
echo
cat "$out/report.md" 2>/dev/null
echo "----- summary"
cat "$summary"
exit "$failed"
