#!/bin/sh
# `make bench`: finds the Python that has PyTorch and hands over to run.py. Arguments: the folder of fleet's programs, options of run.py.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${FLEET_BENCH_PYTHON:-$here/.venv/bin/python}
if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "error: $python has no PyTorch; make its environment as bench/README.md says, or set FLEET_BENCH_PYTHON" >&2
    exit 4
fi
bin=$1
shift
(cd "$here/.." && cargo build --quiet --locked -p fleet-collectives --example collectives)
exec "$python" "$here/run.py" --bin "$bin" "$@"
