#!/usr/bin/env bash
# Makes this clone ready to build: Debian packages that are missing, and libtorch in .libtorch/ from the PyPI wheels; with --cuda also the
# CUDA libraries that libtorch needs on a machine with an NVIDIA driver. Run as often as you like; what is there already is left alone.
# Nothing outside the clone changes but Debian packages.
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

# Networks of their own for tests (namespaces, cuts, slow links), and Prometheus.
test_packages() {
    local missing=() prometheus=""
    command -v ip >/dev/null && command -v tc >/dev/null || missing+=(iproute2)
    command -v nft >/dev/null || missing+=(nftables)
    command -v prometheus >/dev/null || { missing+=(prometheus); prometheus=1; }
    [ ${#missing[@]} -eq 0 ] && return
    # Tests that need them say that they skip.
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then return; fi
    say "installing Debian packages for tests: ${missing[*]}"
    local quiet=(-y -qq --no-install-recommends)
    { DEBIAN_FRONTEND=noninteractive apt-get install "${quiet[@]}" "${missing[@]}" ||
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install "${quiet[@]}" "${missing[@]}"; }; } >/dev/null 2>&1 ||
        say "no ${missing[*]}: tests of networks and of Prometheus will skip"
    # Tests start their own; a service of the system that this has brought is not wanted.
    if [ -n "$prometheus" ] && [ -d /run/systemd/system ]; then systemctl disable --quiet --now prometheus || true; fi
}

# A browser and what drives it, for tests of the page. Node comes with the machine.
PLAYWRIGHT=1.65.1
PLAYWRIGHT_SHA512=86a3e9cfb6e548c3f1595768784d728814b35ec2a254e77693e9230af994cb00f618f3b60ddf477dc5a7abd34dd061db3590c5819f497c116bf97e7f04ba34ab
browser() {
    local tools="${CARGO_TARGET_DIR:-$PWD/target}/tools"
    if ! command -v chromium >/dev/null && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        say "installing Debian packages for tests: chromium"
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null || say "no chromium: tests of the page will skip"
    fi
    [ -e "$tools/playwright-core/complete-$PLAYWRIGHT" ] && return
    command -v npm >/dev/null || { say "no npm: tests of the page will skip"; return; }
    say "fetching playwright-core $PLAYWRIGHT (3 MB) into target/tools/"
    mkdir -p "$tools"
    rm -rf "$tools/playwright-core" "$tools/package"
    if (cd "$tools" && npm pack --silent "playwright-core@$PLAYWRIGHT" >/dev/null) &&
        echo "$PLAYWRIGHT_SHA512  $tools/playwright-core-$PLAYWRIGHT.tgz" | sha512sum --quiet --check; then
        tar -C "$tools" -xzf "$tools/playwright-core-$PLAYWRIGHT.tgz"
        mv "$tools/package" "$tools/playwright-core"
        touch "$tools/playwright-core/complete-$PLAYWRIGHT"
    else
        say "playwright-core $PLAYWRIGHT cannot be had, or is another one: tests of the page will skip"
    fi
    rm -f "$tools/playwright-core-$PLAYWRIGHT.tgz"
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

# cuBLAS, cuDNN, NCCL, NVRTC and the others, of the versions that the torch wheel names. They lie beside it, where it looks for them.
cuda() {
    if [ -n "${LIBTORCH:-}" ]; then
        # The wheel of a Python environment finds them there; another libtorch brings its own.
        [ -e "$LIBTORCH/lib/libtorch_cuda.so" ] || die "LIBTORCH=$LIBTORCH has no lib/libtorch_cuda.so: it is a libtorch for the CPU; unset it to let setup fetch one"
        return
    fi
    [ "$(uname -s)" = Linux ] || die "CUDA needs Linux"
    [ -e .libtorch/complete-cuda-$TORCH ] && return
    local wanted=() line
    while read -r line; do wanted+=("${line%%;*}"); done < <(sed -n 's/^Requires-Dist: \(\(cuda-toolkit\|nvidia-\)[^ ]*.*\)/\1/p' .libtorch/torch-$TORCH*.dist-info/METADATA)
    [ ${#wanted[@]} -gt 0 ] || die "the torch wheel names no CUDA libraries; fetch it again: rm -rf .libtorch"
    [ "$(df --output=avail -k .libtorch | tail -1)" -gt 8000000 ] || die "the CUDA libraries need 8 GB of room while they are unpacked; $(df -h --output=avail .libtorch | tail -1 | tr -d ' ') is free"
    say "fetching the CUDA libraries (2.0 GB to fetch, 3.3 GB on disk) into .libtorch/"
    mkdir -p .libtorch/wheels
    python3 -m pip download --quiet --disable-pip-version-check --dest .libtorch/wheels "${wanted[@]}" ||
        die "pip could not fetch them; check the network, or set LIBTORCH to the torch folder of a Python environment with torch $TORCH"
    for wheel in .libtorch/wheels/*.whl; do unzip -q -o "$wheel" -d .libtorch && rm "$wheel"; done
    rm -r .libtorch/wheels
    touch .libtorch/complete-cuda-$TORCH
}

debian_packages
libtorch
for option in "$@"; do
    case $option in
        --tests)
            test_packages
            browser
            ;;
        --cuda) cuda ;;
        *) die "unknown option $option" ;;
    esac
done
say "ready"
