#!/usr/bin/env bash
# Puts the programs and what of libtorch they load into one folder, as they lie to each other in a clone. Arguments: the folder of the
# programs, and the one to make. Run in the root of the clone.
set -euo pipefail
bin="$1" out="$2"
root="$PWD"
mkdir -p "$out/programs/bin"
for program in fleet coordinator worker fleet-rank; do
    install -m 0755 "$bin/$program" "$out/programs/bin/$program"
    strip --strip-debug "$out/programs/bin/$program"
done
libraries() {
    ldd "$bin/fleet-rank" | sed -n 's/.* => \(\/.*\) (0x.*/\1/p'
    # Those for CUDA are loaded at run time.
    if compgen -G ".libtorch/complete-cuda-*" >/dev/null; then
        find .libtorch/torch/lib .libtorch/nvidia -name '*.so*'
    fi
}
libraries | xargs -r realpath -s | sort -u | while read -r library; do
    case $library in
        "$root"/.libtorch/*)
            relative="${library#"$root"/}"
            mkdir -p "$out/$(dirname "$relative")"
            cp -L "$library" "$out/$relative"
            ;;
    esac
done
[ -e "$out/.libtorch/torch/lib/libtorch_cpu.so" ] || { echo "collect: error: $bin/fleet-rank does not find libtorch in $root/.libtorch" >&2; exit 1; }
