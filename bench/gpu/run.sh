#!/usr/bin/env bash
# On a machine with an NVIDIA driver and a Python with torch 2.11.0 (and transformers, for the other side): the GPU tests, then fleet beside PyTorch.
# Part of the archive that `make gpu-bundle` makes; nothing is built here and nothing is fetched.
set -uo pipefail
cd "$(dirname "$0")"
export PYTHONUNBUFFERED=1 FLEET_GOLDEN="$PWD/families"
torch=$(python3 -c 'import os, torch; print(os.path.dirname(torch.__file__))') || { echo "error: python3 has no torch" >&2; exit 4; }
nvidia=$(python3 -c 'import nvidia, os
folders = (os.path.join(p, d, "lib") for p in nvidia.__path__ for d in sorted(os.listdir(p)))
print(":".join(f for f in folders if os.path.isdir(f)))' 2>/dev/null)
export LD_LIBRARY_PATH="$torch/lib:$nvidia"
say() { printf '== %s (%d s)\n' "$*" "$SECONDS"; }

say "machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
grep -m1 'model name' /proc/cpuinfo
python3 -c 'import torch; print("torch", torch.__version__)'

say "tests"
timeout 120 ./families-test --test-threads 1 2>&1 | tail -25

say "fleet"
for model in "124m 16 1024" "1b 8 2048"; do
    for numbers in bf16 bf16-stream; do
        # Words of their own: model, sequences, tokens.
        timeout 90 ./torch_speed $model 20 "$numbers" cuda 2>&1 | tail -3
    done
done

say "PyTorch"
for mode in eager compile; do
    timeout 90 python3 pytorch.py 124m 16 1024 20 "$mode" 2>&1 | tail -2
done
timeout 90 python3 pytorch.py 1b 8 2048 20 eager 2>&1 | tail -2
say "done"
