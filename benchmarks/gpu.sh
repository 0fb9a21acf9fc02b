#!/usr/bin/env bash
# On a host with a GPU: builds, then runs PARTS: the GPU tests, the benchmarks of passes (a part for
# each shape) and, with SHAPE, those of preemption and policies. Writes OUT/PART.json and
# OUT/PART.log, and prints a table last. Its parts end within LIMIT_S of its start: what has not
# ended by then is cut off, what has not begun is left out, and both are said.
#
# It needs no network and installs nothing outside of the repository: torch, a C++ compiler, nvcc,
# CMake and ninja are the host's; what the host's Python lacks of gpu-requirements.txt comes as
# wheels in WHEELS. No GPU has run it yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl}
OUT=${OUT:-runs/gpu}
PARTS=${PARTS:-tests llama-3-8b preemption qwen2.5-14b policies}
SHAPE=${SHAPE:-llama-3-8b} # of preemption and policies
LIMIT_S=${LIMIT_S:-570}

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "no CUDA device")'
mkdir -p "$OUT"
rm -f "$OUT"/*.json "$OUT"/*.log
{ nvidia-smi -L && free -g && df -h /dev/shm && "$PYTHON" --version && nvcc --version; } \
  >"$OUT/host.log" 2>&1 || true

# Kept for the next call, unless the native core has changed.
site=$PWD/build/gpu-site
export PYTHONPATH=$site:$PWD/proto:$PWD/gpuworker:$PWD/client:$PWD/tests
install() { "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation --target "$site" "$@"; }
if [[ ! -e $site/.done || -n $(find cpuattn -newer "$site/.done" -print -quit) ]]; then
  rm -rf "$site" && mkdir -p "$site"
  if compgen -G "$WHEELS/*.whl" >/dev/null; then install "$WHEELS"/*.whl; fi
  install ./cpuattn
  touch "$site/.done"
fi
# Head dimensions and windows of the tests' models and of the shapes.
timeout -k 5 300 "$PYTHON" - <<'MODULES' ||
import torch
from omniserve.gpuworker.device.cuda.flashinfer_modules import compile_modules
compile_modules([(64, False), (64, True), (128, False)], torch.bfloat16)
MODULES
  echo "gpu.sh: no kernels of FlashInfer ($?), see above. Where it is not installed, plain torch" \
    "runs, many times slower; else each part tries to compile them again" >&2
echo "gpu.sh: built after $SECONDS s" >&2

# run PART SECONDS COMMAND...: at most so many seconds; what it prints ends with its figures.
run() {
  local part=$1 most_s=$2 left_s=$((LIMIT_S - SECONDS))
  shift 2
  if ((left_s < 30)); then
    echo "gpu.sh: $part is left out: no time" >&2
    return
  fi
  timeout -k 5 $((most_s < left_s ? most_s : left_s)) "$@" >"$OUT/$part.json" 2>"$OUT/$part.log" ||
    { echo "gpu.sh: $part failed or was cut off ($?):" >&2 && tail -n 8 "$OUT/$part.log" >&2; }
}

for part in $PARTS; do
  case $part in
  tests)
    run tests 300 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/gpu
    if [[ -e $OUT/tests.json ]]; then mv "$OUT/tests.json" "$OUT/tests.log"; fi
    ;;
  preemption)
    run preemption 150 "$PYTHON" benchmarks/preemption.py --parts response --rounds 50 \
      --shape "$SHAPE" --device cuda --json
    ;;
  policies) run policies 600 "$PYTHON" benchmarks/gpu_policies.py --shape "$SHAPE" --json ;;
  qwen2.5-14b) # with 1,024 tokens a batch of 256 would just fill 80 GB
    run "$part" 240 "$PYTHON" benchmarks/gpu_stages.py --shape "$part" --context 768 --json
    ;;
  *) run "$part" 240 "$PYTHON" benchmarks/gpu_stages.py --shape "$part" --json ;;
  esac
done

if [[ -e $OUT/tests.log ]]; then tail -n 1 "$OUT/tests.log"; fi
"$PYTHON" - "$OUT" <<'TABLE'
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    try:
        report = json.loads(path.read_text().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        print(path.stem, "has no figures")
        continue
    if "response_ms" in report:
        print("preemption", report["model"], report["response_ms"], "stage", report["stage_ms"], "ms")
        continue
    if "policies" in report:
        print(report["shape"], "policies, host reads {:.0f} GB/s".format(report["host_read_gbs"]))
        for row in report["policies"]:
            print("  {name:12s} {ls_attainment:.3f} met  {be_tokens_per_s:8.0f} BE tok/s  "
                  "{servers_read_gbs:6.1f} GB/s".format(**row))
        print(" ", report.get("omniserve"))
        continue
    print(report["shape"], report["device"], report["limits"])
    for row in report["ls"]:
        print("  batch {batch:4d}  {tpot_ms:8.2f} ms  {fraction:.2f} of the roofline, "
              "{bubble_ms:.2f} ms idle, {launch_ms:.2f} ms to launch".format(**row))
    for row in report["boarded"]:
        print("  boarded {rows:4d}  {pass_ms:8.2f} ms  {over_alone:.2f} of the pass alone, "
              "{bubble_ms:.2f} ms idle, {launch_ms:.2f} ms to launch".format(**row))
    print(" ", report["transfers"])
TABLE
