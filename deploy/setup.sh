#!/usr/bin/env bash
# Makes this clone ready to build: Debian packages that are missing, and libtorch in .libtorch/ from the PyPI wheels.
# Run as often as you like; what is there already is left alone. Nothing outside the clone changes but Debian packages.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.11.0 # the version that tch 0.24.0 speaks

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 4; }

debian_packages() {
    local missing=()
    compgen -G "/usr/lib/llvm-*/lib/libclang.so*" >/dev/null || compgen -G "/usr/lib/*/libclang-[0-9]*.so*" >/dev/null || missing+=(libclang-dev)
    command -v protoc >/dev/null || missing+=(protobuf-compiler)
    command -v c++ >/dev/null || missing+=(g++)
    command -v unzip >/dev/null || missing+=(unzip)
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || die "missing: ${missing[*]}; install them with your package manager (RocksDB's bindings want libclang, raft's messages protoc)"
    local sudo=""
    [ "$(id -u)" -eq 0 ] || sudo="sudo"
    say "installing Debian packages: ${missing[*]}"
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq "${missing[@]}" >/dev/null
}

# Networks of their own for tests: namespaces, cuts, slow links.
test_packages() {
    local missing=()
    command -v ip >/dev/null && command -v tc >/dev/null || missing+=(iproute2)
    command -v nft >/dev/null || missing+=(nftables)
    [ ${#missing[@]} -eq 0 ] && return
    # Tests that need them say that they skip.
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then return; fi
    say "installing Debian packages for tests: ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null || say "no ${missing[*]}: tests of networks will skip"
}

libtorch() {
    if [ -n "${LIBTORCH:-}" ]; then
        [ -e "$LIBTORCH/lib/libtorch_cpu.so" ] || die "LIBTORCH=$LIBTORCH has no lib/libtorch_cpu.so; unset it to let setup fetch libtorch $TORCH"
        say "using LIBTORCH=$LIBTORCH"
        return
    fi
    if [ -e .libtorch/complete-$TORCH ]; then
        return
    fi
    [ "$(uname -sm)" = "Linux x86_64" ] || [ "$(uname -sm)" = "Linux aarch64" ] || [ "$(uname -s)" = Darwin ] || die "no libtorch wheel for $(uname -sm); set LIBTORCH"
    command -v python3 >/dev/null || die "python3 with pip is needed once, to fetch libtorch; or set LIBTORCH"
    say "fetching libtorch $TORCH (530 MB to fetch, 1.2 GB on disk) into .libtorch/"
    rm -rf .libtorch
    mkdir -p .libtorch/wheels
    local extra=()
    [ "$(uname -s)" = Linux ] && extra=('nvidia-cuda-cupti==13.0.*' 'nvidia-cuda-runtime==13.0.*')
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest .libtorch/wheels "torch==$TORCH" "${extra[@]}" ||
        die "pip could not fetch torch==$TORCH; check the network, or set LIBTORCH to an unpacked libtorch $TORCH"
    for wheel in .libtorch/wheels/*.whl; do unzip -q -o "$wheel" -d .libtorch; done
    rm -r .libtorch/wheels
    touch .libtorch/complete-$TORCH
}

debian_packages
[ "${1:-}" != --tests ] || test_packages
libtorch
say "ready"
