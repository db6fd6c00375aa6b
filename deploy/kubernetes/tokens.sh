#!/usr/bin/env bash
# Makes the Secrets with join tokens, which coordinators and workers wait for. Needs kubectl, and a coordinator that runs.
#
#   deploy/kubernetes/tokens.sh [coordinator|worker]... [-n NAMESPACE]
#
# Without a name it makes both. That for coordinators lets two join within an hour; make it anew when one is to be replaced.
set -euo pipefail

die() { printf 'tokens: error: %s\n' "$*" >&2; exit 2; }

namespace=fleet
roles=()
while [ $# -gt 0 ]; do
    case $1 in
        -n) namespace="${2:?-n NAMESPACE}"; shift ;;
        coordinator | worker) roles+=("$1") ;;
        *) die "unknown: $1; there is coordinator, worker, -n NAMESPACE" ;;
    esac
    shift
done
[ ${#roles[@]} -gt 0 ] || roles=(coordinator worker)

k() { kubectl --namespace "$namespace" "$@"; }

# The first coordinator that answers runs the command.
on_a_coordinator() {
    local pod
    for pod in $(k get pods -l app.kubernetes.io/name=fleet,app.kubernetes.io/component=coordinator -o name); do
        if k exec "$pod" -c coordinator -- fleet --cluster /var/lib/fleet/data/ "$@" 2>/dev/null; then return; fi
    done
    die "no coordinator in the namespace $namespace made a token; kubectl -n $namespace get pods says what runs, and their logs why not"
}

for role in "${roles[@]}"; do
    case $role in
        coordinator) life=(--uses 2 --ttl 1h) ;;
        # Nodes come and go. Whoever can read it can add nodes; `fleet token revoke` ends it.
        worker) life=(--uses 10000 --ttl 365d) ;;
    esac
    token="$(on_a_coordinator token create --role "$role" "${life[@]}")"
    # By stdin: arguments can be seen by other users of this machine.
    printf '%s\n' "$token" |
        k create secret generic "fleet-$role-token" --from-file=token=/dev/stdin --dry-run=client -o yaml |
        k apply -f -
done
