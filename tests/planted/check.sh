#!/usr/bin/env bash
# Puts known bugs back, one at a time, and sees the simulator catch each. Every patch beside this script is applied to a copy of HEAD
# in a worktree of its own; nothing here is ever part of the product.
#
#   tests/planted/check.sh [NAME...]      SEEDS=1..500 HOURS=0.5 PLANTED_TARGET=DIR
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(git -C "$here" rev-parse --show-toplevel)
seeds=${SEEDS:-1..500}
hours=${HOURS:-0.5}
# A target directory of its own, kept between patches and runs, so that only what a patch touches is compiled again.
target=${PLANTED_TARGET:-$root/target/planted}
tree=$target/tree

mkdir -p "$target"
git -C "$root" worktree prune
[ -e "$tree" ] || git -C "$root" worktree add --detach --force "$tree" HEAD >/dev/null
git -C "$tree" checkout --quiet --force --detach "$(git -C "$root" rev-parse HEAD)"
trap 'git -C "$tree" checkout --quiet --force' EXIT

names=("$@")
if [ ${#names[@]} -eq 0 ]; then
    for patch in "$here"/*.patch; do names+=("$(basename "$patch" .patch)"); done
fi

missed=0
for name in "${names[@]}"; do
    git -C "$tree" checkout --quiet --force
    git -C "$tree" apply "$here/$name.patch"
    (cd "$tree" && CARGO_TARGET_DIR=$target cargo build --quiet -p fleet-tests --bin simulate)
    begun=$SECONDS
    status=0
    output=$("$target/debug/simulate" --seeds "$seeds" --hours "$hours") || status=$?
    last=$(tail -1 <<<"$output")
    # Only a rule that was broken counts: a simulator that dies of anything else has caught nothing.
    if [ $status -ne 0 ] && violation=$(grep -m1 VIOLATION <<<"$output"); then
        echo "caught  $name after ${last%% *} seeds ($((SECONDS - begun)) s): ${violation:0:200}"
    else
        echo "MISSED  $name (status $status): $last"
        missed=$((missed + 1))
    fi
done
exit $((missed > 0))
