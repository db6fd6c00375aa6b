#!/usr/bin/env bash
# The main job: four ranks train on this clone's own text; then checks that it learned and left nothing running, and lets the
# checkpoint speak. Argument: the folder of the programs.
set -euo pipefail
cd "$(dirname "$0")/.."
bin="$1"
say() { printf '\ndemo: %s\n' "$*"; }
fail() { printf 'demo: error: %s\n' "$*" >&2; exit 1; }

lines="$(mktemp)"
mark="FLEET_DEMO=$$.$RANDOM$RANDOM" # in the environment of all that this demo starts, and of nothing else
trap 'rm -f "$lines"' EXIT
rm -rf training_output/checkpoints/demo # of an earlier demo

say "fleet launch -n 4 examples/self.toml: a coordinator, a node, four ranks"
env "$mark" "$bin/fleet" launch -n 4 examples/self.toml --set run_name=demo | tee "$lines"

share="$(sed -n 's/.*evaluation loss .* -> .* (\([0-9]*\)%).*/\1/p' "$lines" | tail -1)"
checkpoint="$(sed -n 's/^checkpoint: //p' "$lines" | tail -1)"
[ -n "$share" ] && [ -n "$checkpoint" ] || fail "the run printed no summary"
[ "$share" -lt 60 ] || fail "validation loss fell only to $share% of what it was; under 60% was expected"
left="$(grep -lszxF "$mark" /proc/[0-9]*/environ || true)"
[ -z "$left" ] || fail "processes were left behind: $left"
say "validation loss fell to $share% of what it was before the first step; no process is left"

say "fleet generate --model $checkpoint"
"$bin/fleet" generate --model "$checkpoint" --prompt "//! The " --max-new-tokens 160 --temperature 0.7 --top-k 50 --seed 7
