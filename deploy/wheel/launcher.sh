#!/bin/sh
# Becomes @PROGRAM@, which lies in the package fleet_train of the Python environment that this file belongs to.
own=$0
[ -L "$own" ] && own=$(readlink -f -- "$own")
here=${own%/*}
for packages in "$here"/../lib/python3*/site-packages "$here"/../lib64/python3*/site-packages "$here"/../lib/python3*/dist-packages "$here"/..; do
    program=$packages/fleet_train/bin/@PROGRAM@
    [ -x "$program" ] && exec "$program" "$@"
done
echo "error: the package fleet_train is not beside $own; \`pip install\` the wheel of fleet again" >&2
exit 4
