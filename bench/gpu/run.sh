#!/usr/bin/env bash
# On a machine with an NVIDIA driver and a Python with torch 2.11.0 (and transformers, for the other side): the GPU tests, then fleet beside PyTorch.
# Part of the archive that `make gpu-bundle` makes; nothing is built here and nothing is fetched.
# Each part runs whatever became of the others; the last line and the exit code say which failed.
set -uo pipefail
cd "$(dirname "$0")"
export PYTHONUNBUFFERED=1 FLEET_GOLDEN="$PWD/families"
torch=$(python3 -c 'import os, torch; print(os.path.dirname(torch.__file__))') || { echo "error: python3 has no torch" >&2; exit 4; }
nvidia=$(python3 -c 'import nvidia, os
folders = (os.path.join(p, d, "lib") for p in nvidia.__path__ for d in sorted(os.listdir(p)))
print(":".join(f for f in folders if os.path.isdir(f)))' 2>/dev/null)
export LD_LIBRARY_PATH="$torch/lib:$nvidia"
say() { printf '== %s (%d s)\n' "$*" "$SECONDS"; }
failed=()
# NAME SECONDS COMMAND...: its last lines, and what became of it.
part() {
    local name=$1 seconds=$2 code
    shift 2
    timeout "$seconds" "$@" 2>&1 | tail -"${lines:-3}"
    code=${PIPESTATUS[0]}
    [ "$code" = 0 ] && return
    [ "$code" = 124 ] && echo "$name: not done within $seconds s" || echo "$name: exit code $code"
    failed+=("$name")
}

say "machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
grep -m1 'model name' /proc/cpuinfo
python3 -c 'import torch; print("torch", torch.__version__)'

say "tests"
lines=25 part tests 240 ./families-test --test-threads 1
lines=25 part "sharded tests" 120 ./sharded-test --test-threads 1

say "fleet"
for model in "124m 16 1024" "1b 8 2048"; do
    for numbers in bf16 bf16-stream; do
        # Words of their own: model, sequences, tokens.
        part "fleet $model $numbers" 120 ./torch_speed $model 20 "$numbers" cuda
    done
done

say "PyTorch"
for mode in eager compile; do
    part "PyTorch 124m $mode" 180 python3 pytorch.py 124m 16 1024 20 "$mode"
    part "PyTorch 1b $mode" 180 python3 pytorch.py 1b 8 2048 20 "$mode"
done
say "done: ${#failed[@]} failed"
[ ${#failed[@]} = 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
