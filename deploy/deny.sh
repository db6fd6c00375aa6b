#!/usr/bin/env bash
# cargo-deny: bans, licenses and sources always; advisories where their database can be had.
set -euo pipefail
cd "$(dirname "$0")/.."
tools="${CARGO_TARGET_DIR:-$PWD/target}/tools"
export PATH="$tools/bin:$PATH"
if ! command -v cargo-deny >/dev/null; then
    echo "deny: installing cargo-deny (a few minutes, once)"
    cargo install --quiet --locked --root "$tools" cargo-deny@0.20.2
fi
cargo deny --locked check bans licenses sources
if cargo deny --locked fetch db >/dev/null 2>&1; then
    cargo deny --locked check advisories
else
    echo "deny: SKIPPED advisories: their database cannot be fetched here"
fi
