#!/usr/bin/env bash
# One visit to a machine with a GPU, in one call of at most 9 minutes:
#   bash benchmarks/gpu_visit.sh OUT_DIR [operators|models]
# Installs, measures the ceilings, runs tests on the GPU beside the benchmarks (`benchmarks.turns`:
# rows are compiled side by side and timed one at a time, all others stopped), and makes the report.
# "operators": the rows of every operator that have a goal there. "models": training and sampling of
# DFM-XL/2 and SnapGen's networks, in torch's default mode, as max-autotune takes minutes each.
# A step that fails or runs out of time stops nothing; the summary at the end says which did.
# With no GPU (or --dry-run as third argument) it runs the same steps on the CPU, cut short.
# SKIP="tests memcheck" leaves steps out. TESTS is pytest's -k; ROWS, of lines, what is passed to
# benchmarks.turns, and BESIDE of more commands beside them; SECONDS_OF_ROW the timing of each.
# Kernels compiled before (`benchmarks.ahead .whl/kernels.tar.xz`) are not compiled again.
# DFM_FAST_COMMIT names the commit where the folder is no git repository.
set -uo pipefail

out=${1:?usage: gpu_visit.sh OUT_DIR [operators|models] [--dry-run]}
rows=${2:-operators}
mode=${3:-}
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

# Kernels of before, where Triton would look for its own.
unpack() {
    mkdir -p "$TRITON_CACHE_DIR" && tar -xJf .whl/kernels.tar.xz -C "$TRITON_CACHE_DIR" || return
    "$python" -c '
import os, sys
from triton.runtime.cache import triton_key
folder = os.environ["TRITON_CACHE_DIR"]
same = triton_key() == open(f"{folder}/triton_key").read()
sys.exit(None if same else "compiled by another Triton: all will be compiled again")'
}

export -f facts install_package built ceilings memcheck unpack
export python gpu device work

[ "$gpu" = 1 ] || note visit "no GPU: the same steps on the CPU, cut short"
step facts 30 bash -c facts
if [ "$mode" = --dry-run ]; then
    note install "skipped: dry run"
else
    step install 60 bash -c install_package
fi
if [ -e .whl/kernels.tar.xz ]; then
    export TRITON_CACHE_DIR=/tmp/triton_cache
    step kernels 60 bash -c unpack
fi
[ -d /tmp/site ] && export PYTHONPATH=/tmp/site${PYTHONPATH:+:$PYTHONPATH}
step import 60 "$python" -c 'import dfm_fast; print(dfm_fast.__version__)'
[ "$gpu" = 1 ] && build &
step ceilings 40 bash -c ceilings

default="-- --compile-mode default"
if [ "$rows" = models ]; then
    asked="dfm_xl_512 and training $default
        dfm_xl_512 and steps_30 $default
        snapgen_1024 and cached and not snapgen_1024_8 $default
        snapgen_1024_8 $default
        bench_decoders and pixels_1024 $default"
else
    asked="bench_norms and dit_xl_training
        bench_group_norms and bfloat16 and channels_last and (unet_256_128 or unet_512_64 or maps_past_l2)
        bench_group_norms and bfloat16 and contiguous and (unet_256_128 or maps_past_l2)
        bench_convolutions and bfloat16 and maps_past_l2
        bench_convolutions and 3x3 and bfloat16 and forward and (unet_256_128 or unet_1792_32)
        bench_rotaries and bfloat16
        bench_activations and bfloat16 and large and not feed and not gated_linear
        bench_activations and bfloat16 and large and (feed or gated_linear) $default
        bench_noises and (large_latents or front_end)
        bench_steps
        bench_attentions and bfloat16
        bench_separables and block and channels_last and large and not one_kernel $default
        bench_pyramids and bfloat16 and large_latents
        bench_pyramids and binomial and photos_512 and float32 and contiguous
        bench_upsamples and bfloat16 and (large_up_512 or up_512_32) $default
        bench_blocks and bfloat16 $default"
fi
selected="cuda and not cuda_sources"
tests="-m pytest tests -q --tb=short -p no:cacheprovider --continue-on-collection-errors"
if [ "$gpu" = 1 ]; then
    "$python" -c 'import xdist' 2>/dev/null && tests+=" -n ${WORKERS:-8} --dist worksteal"
    options=(--seconds "${SECONDS_OF_ROW:-0.3}")
    step build 120 bash -c built
else
    step smoke 60 "$python" -m benchmarks.smoke "$device"
    asked="bench_pyramids and haar_build
        dfm_s_256 and forward and not sampling $default"
    selected="test_report"
    options=(--seconds 0.1 --device cpu)
fi
limit="timeout --foreground --signal=INT --kill-after=15 $((deadline - SECONDS - 60))"
beside=()
case " ${SKIP:-} " in
    *" tests "*) ;;
    *) beside=(--beside "$limit env OMP_NUM_THREADS=1 $python $tests -k '${TESTS:-$selected}'") ;;
esac
while read -r command; do beside+=(--beside "$command"); done < <(sed '/^ *$/d' <<<"${BESIDE:-}")
[ -z "${ROWS:-}" ] || asked=$ROWS
mapfile -t asked < <(sed 's/^ *//; /^$/d' <<<"$asked")
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$work/inductor} TORCHINDUCTOR_COMPILE_THREADS=2
step benchmarks $((deadline - SECONDS - 25)) "$python" -m benchmarks.turns "${asked[@]}" \
    --results "$work/results" "${beside[@]}" "${options[@]}"
if [ "$gpu" = 1 ] && command -v compute-sanitizer >/dev/null; then
    step memcheck 75 bash -c memcheck
else
    note memcheck "skipped: no compute-sanitizer or no GPU"
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
