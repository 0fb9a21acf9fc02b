#!/usr/bin/env bash
# On a host with a GPU: builds, runs the GPU tests, the benchmarks of passes and, with the first
# shape, those of preemption and policies; writes OUT/*.json and prints a table last. It needs no
# network and installs nothing outside of a temporary folder: torch, a C++ compiler, CMake and
# nanobind are the host's, and wheels of what the host's Python lacks are taken from WHEELS. Without
# those of what processes need (grpcio, pydantic-settings, ...) the last two are left out, which it
# says. No GPU has run it yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl}
OUT=${OUT:-runs/gpu}
SHAPES=${SHAPES:-llama-3-8b qwen2.5-14b}

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "no CUDA device")'
mkdir -p "$OUT"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
install() { "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation --target "$site" "$@"; }
if compgen -G "$WHEELS/*.whl" >/dev/null; then install "$WHEELS"/*.whl; fi
install ./cpuattn
export PYTHONPATH=$site:$PWD/proto:$PWD/gpuworker:$PWD/client:$PWD/tests

"$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/gpu 2>&1 | tee "$OUT/tests.log" || true
rm -f "$OUT"/*.json
failed() { echo "gpu.sh: $1 failed" >&2 && rm "$OUT/$1.json"; }
for shape in $SHAPES; do
  "$PYTHON" benchmarks/gpu_stages.py --shape "$shape" --json >"$OUT/$shape.json"
done
if "$PYTHON" -c 'import omniserve.gpuworker.__main__, omniserve.cpuattn.server'; then
  "$PYTHON" benchmarks/preemption.py --parts response --shape "${SHAPES%% *}" --device cuda --json \
    >"$OUT/preemption.json" || failed preemption
  "$PYTHON" benchmarks/gpu_policies.py --shape "${SHAPES%% *}" --json >"$OUT/policies.json" ||
    failed policies
else
  echo "gpu.sh: preemption and policies are left out: packages are missing" >&2
fi

tail -n 1 "$OUT/tests.log"
"$PYTHON" - "$OUT" <<'TABLE'
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    report = json.loads(path.read_text())
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
              "{bubble_ms:.2f} ms idle".format(**row))
    for row in report["boarded"]:
        print("  boarded {rows:4d}  {pass_ms:8.2f} ms  {over_alone:.2f} of the pass alone, "
              "{bubble_ms:.2f} ms idle".format(**row))
    print(" ", report["transfers"])
TABLE
