#!/usr/bin/env bash
# Packs what a machine with a GPU needs to run the GPU tests and the GPU benchmark: programs without their symbols, the golden files, one script.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu-bundle.tar.gz}
bin=${CARGO_TARGET_DIR:-target}/debug
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
into=$stage/gpu-bundle
mkdir "$into"
# NAME: the program of a test of the torch executor.
built() {
    cargo test -p fleet-torch --locked --test "$1" --no-run --message-format=json 2>/dev/null |
        sed -n "s/.*\"executable\":\"\([^\"]*\/$1-[^\"]*\)\".*/\1/p" | tail -1
}
cargo build -p fleet-torch --locked --example torch_speed
cp "$(built families)" "$into/families-test"
cp "$(built sharded)" "$into/sharded-test"
cp "$bin/examples/torch_speed" bench/gpu/run.sh bench/gpu/pytorch.py "$into/"
strip "$into/families-test" "$into/sharded-test" "$into/torch_speed"
cp -r tests/parity/golden/families "$into/families"
tar -C "$stage" -czf "$out" gpu-bundle
printf '%s: %s KiB; unpack it there and run gpu-bundle/run.sh\n' "$out" "$(du -k "$out" | cut -f1)"
