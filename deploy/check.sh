#!/usr/bin/env bash
# Checks what deploy/ ships with the tools it is for: Prometheus' promtool, systemd-analyze, kubectl, helm, kubernetes-validate, shellcheck.
# A tool that is not there is named, and what it checks is skipped; with --strict that is an error.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

strict=""
case "${1:-}" in
    --strict) strict=1 ;;
    '') ;;
    *) echo "usage: deploy/check.sh [--strict]" >&2; exit 2 ;;
esac
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
failed=() skipped=()

check() {
    local what="$1"
    shift
    if "$@" >"$scratch/said" 2>&1; then
        echo "check: ok: $what"
    else
        echo "check: FAILED: $what"
        sed 's/^/    /' "$scratch/said"
        failed+=("$what")
    fi
}

# Whether a tool is there. What it would have checked is skipped otherwise.
tool() {
    command -v "$1" >/dev/null && return
    echo "check: SKIPPED: $2: $1 is not on PATH ($3)"
    skipped+=("$2")
    return 1
}

# A command that succeeds and says nothing.
silent() {
    local said
    said="$("$@" 2>&1)" && [ -z "$said" ] && return
    printf '%s\n' "$said"
    return 1
}

prometheus() {
    check "prometheus.yml and its rules" promtool check config deploy/prometheus/prometheus.yml
    check "tests of alerts" promtool test rules deploy/prometheus/rules/alerts_test.yml
}

# What the units start is not installed here, and neither is their user.
units() {
    local unit name
    mkdir "$scratch/units"
    printf '#!/bin/sh\n' >"$scratch/units/entrypoint"
    chmod +x "$scratch/units/entrypoint"
    for unit in deploy/systemd/*.service; do
        name="$(basename "$unit")"
        sed "s#/usr/local/lib/fleet/entrypoint#$scratch/units/entrypoint#" "$unit" >"$scratch/units/$name"
        # In tenths: under 3.0.
        check "exposure of $name" systemd-analyze security --offline=true --threshold=29 "$unit"
    done
    check "units" silent systemd-analyze verify --man=no "$scratch"/units/*.service
}

# Of Python, in an environment of its own.
validator() {
    local tools="${CARGO_TARGET_DIR:-$PWD/target}/tools/kubernetes-validate"
    if ! command -v kubernetes-validate >/dev/null && [ ! -x "$tools/bin/kubernetes-validate" ] && command -v python3 >/dev/null; then
        echo "check: installing kubernetes-validate (once)"
        { python3 -m venv "$tools" && "$tools/bin/pip" install --quiet --disable-pip-version-check 'kubernetes-validate==1.37.*'; } >/dev/null 2>&1 || rm -rf "$tools"
    fi
    PATH="$PATH:$tools/bin"
}

schemas() {
    if tool kubernetes-validate "schemas of $2" "pip install kubernetes-validate"; then
        check "schemas of $2" kubernetes-validate --strict --no-warn "$1"
    fi
}

# kubectl joins them; without it each is looked at by itself.
manifests() {
    local file
    if tool kubectl "the kustomization" "from the makers of Kubernetes"; then
        # shellcheck disable=SC2016 # the inner shell expands it
        check "the kustomization" sh -c 'kubectl kustomize deploy/kubernetes >"$0"' "$scratch/kustomized.yaml"
        schemas "$scratch/kustomized.yaml" "the kustomization"
    else
        for file in deploy/kubernetes/{namespace,coordinators,workers,network}.yaml; do schemas "$file" "$file"; done
    fi
}

chart() {
    local five=(--set coordinator.replicas=5 --set coordinator.storage.className=fast --set "worker.arguments={--slots,8}" --set worker.nodeSelector.gpu=yes)
    check "the chart" helm lint --strict deploy/helm/fleet
    helm template fleet deploy/helm/fleet --namespace fleet >"$scratch/chart.yaml"
    schemas "$scratch/chart.yaml" "the chart"
    helm template fleet deploy/helm/fleet "${five[@]}" --set network.policies=false >"$scratch/five.yaml"
    schemas "$scratch/five.yaml" "the chart with other values"
}

# Each query as a series that is recorded, which promtool can read.
queries() {
    python3 - deploy/grafana/dashboards/*.json >"$scratch/queries.yml" <<'PY'
import json, re, sys
rules = []
for path in sys.argv[1:]:
    for panel in json.load(open(path))["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "1m")
            rules.append({"record": f"query:{len(rules)}", "expr": re.sub(r"\$\w+", ".+", query)})
print(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
PY
    check "queries of dashboards" promtool check rules "$scratch/queries.yml"
}

if tool promtool "Prometheus' configuration, rules and alerts" "apt-get install prometheus"; then prometheus; fi
if tool systemd-analyze "units of systemd" "apt-get install systemd"; then units; fi
validator
manifests
if tool helm "the chart" "from the makers of Helm"; then chart; fi
if tool python3 "the dashboards' JSON and queries" "apt-get install python3"; then
    for file in deploy/grafana/dashboards/*.json; do check "$(basename "$file")" python3 -m json.tool "$file" /dev/null; done
    if command -v promtool >/dev/null; then queries; fi
fi
if tool shellcheck "scripts" "apt-get install shellcheck"; then
    check "scripts" shellcheck deploy/check.sh deploy/*/*.sh deploy/slurm/fleet.sbatch
fi

echo "check: ${#failed[@]} failed, ${#skipped[@]} skipped"
[ ${#failed[@]} -eq 0 ] || exit 1
[ -z "$strict" ] || [ ${#skipped[@]} -eq 0 ] || exit 1
