#!/usr/bin/env bash
# What a container of fleet runs: `coordinator`, `worker`, `health`, or any other command as it is. More options may follow the first two.
# Told by the environment:
#
#   FLEET_DATA_DIR          where it keeps its identity and state, a directory of its own below a volume
#   FLEET_HTTP              where it answers HTTP, which `health` asks; a worker has none without it
#   FLEET_TOKEN_FILE        the join token. It may come later: what needs it waits for it
#   FLEET_NAME              its name in listings
# of a coordinator:
#   FLEET_LISTEN, FLEET_MEMBER_LISTEN, FLEET_ADVERTISE, FLEET_MEMBER_ADVERTISE    as the options of these names
#   FLEET_FOUNDER           FLEET_NAME of the one that may make the cluster
#   FLEET_PEERS             HOST:PORT,... for clients, of the other coordinators
#   FLEET_PEERS_HTTP        HOST:PORT,... for HTTP, of the same
# of a worker:
#   FLEET_COORDINATORS      HOST:PORT,... for clients, of the coordinators
#
# A coordinator is started where its directory has one, and joins where it has none. The one that founds makes a new cluster only if there
# is no sign of an older one: its directory is empty, there is no token for coordinators, and no peer answers.
set -euo pipefail

say() { printf 'entrypoint: %s\n' "$*" >&2; }
die() { printf 'entrypoint: error: %s\n' "$*" >&2; exit 2; }

# As the first process of a container a shell is ended by no signal that it does not name.
trap 'exit 143' TERM INT

# Whether somebody listens at HOST:PORT.
answers() {
    # shellcheck disable=SC2016 # the inner shell expands them
    timeout 2 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "${1%:*}" "${1##*:}" 2>/dev/null
}

wait_for_token() {
    local file="${FLEET_TOKEN_FILE:?is to name the file with the join token}"
    [ -s "$file" ] || say "waiting for a token in $file"
    until [ -s "$file" ]; do sleep 1; done
}

# Appends `--option value` for each variable that is set.
declare -a options
option() {
    local name="$1" value="${!2:-}"
    [ -z "$value" ] || options+=("$name" "$value")
}

founds() {
    [ -n "${FLEET_FOUNDER:-}" ] && [ "$FLEET_FOUNDER" = "${FLEET_NAME:-}" ] || return 1
    # Tokens are made by a cluster: where there is one, there is a cluster.
    if [ -n "${FLEET_TOKEN_FILE:-}" ] && [ -s "$FLEET_TOKEN_FILE" ]; then return 1; fi
    local peer peers="${FLEET_PEERS_HTTP:-}"
    for peer in ${peers//,/ }; do
        if answers "$peer"; then
            say "$peer answers, so there is a cluster already; this coordinator joins it"
            return 1
        fi
    done
}

coordinator() {
    local dir="${FLEET_DATA_DIR:?is to name the data directory}"
    options=(--data-dir "$dir")
    option --listen FLEET_LISTEN
    option --member-listen FLEET_MEMBER_LISTEN
    option --advertise FLEET_ADVERTISE
    option --member-advertise FLEET_MEMBER_ADVERTISE
    option --http FLEET_HTTP
    option --name FLEET_NAME
    if [ -e "$dir/founding.json" ]; then
        say "making the new cluster goes on"
        exec coordinator start "${options[@]}" "$@"
    elif grep -qs '"complete": *false' "$dir/joining.json"; then
        say "joining was interrupted; it begins anew, with a new token"
    elif [ -e "$dir/cluster" ] || [ -e "$dir/restoring.json" ]; then
        exec coordinator start "${options[@]}" --expect-existing "$@"
    elif founds; then
        say "this makes a new cluster"
        exec coordinator start "${options[@]}" "$@"
    fi
    [ -n "${FLEET_PEERS:-}" ] || die "FLEET_PEERS names no coordinator to join"
    wait_for_token
    exec coordinator join "$FLEET_PEERS" --token-file "$FLEET_TOKEN_FILE" "${options[@]}" "$@"
}

worker() {
    local dir="${FLEET_DATA_DIR:?is to name the data directory}"
    options=(--data-dir "$dir")
    option --name FLEET_NAME
    option --http FLEET_HTTP
    if [ ! -e "$dir/identity/cert.pem" ]; then
        wait_for_token
        options+=(--token-file "$FLEET_TOKEN_FILE")
    fi
    exec worker join "${FLEET_COORDINATORS:?is to name coordinators, HOST:PORT,...}" "${options[@]}" "$@"
}

# Asks /healthz on this machine. A coordinator speaks TLS on other addresses than loopback, which a shell cannot: that it listens is all that
# is asked there (Kubernetes asks by itself).
health() {
    local at="${FLEET_HTTP:-127.0.0.1:7080}" status
    local host="${at%:*}" port="${at##*:}"
    case $host in 0.0.0.0 | '[::]') host=127.0.0.1 ;; esac
    if [ -n "${FLEET_LISTEN:-}" ] && [ "${at%:*}" != 127.0.0.1 ]; then
        answers "$host:$port"
        return
    fi
    exec 3<>"/dev/tcp/$host/$port" || exit 1
    printf 'GET /healthz HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' "$host:$port" >&3
    read -t 5 -r _ status _ <&3 || exit 1
    [ "$status" = 200 ]
}

case ${1:-} in
    coordinator | worker | health) "$@" ;;
    '') die "say what to run: coordinator, worker, health, or a command" ;;
    *) exec "$@" ;;
esac
