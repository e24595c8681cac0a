# shellcheck shell=bash
# Shared by the benches that need a cluster. Source it, do not run it.
#
# The bench sets DIR, where its cluster lives, and RESULTS.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
# shellcheck source=hack/lib/node.sh
. "$HACK_DIR/lib/node.sh"

PROFILE=release

kubectl() { "$("$HACK_DIR/build-tools" --path kubectl)" --kubeconfig "$DIR/admin.kubeconfig" "$@"; }
node_ready() { [ "$(kubectl get node "$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]; }
pid_of() { awk '{print $1; exit}' "$1"; }
built() { echo "$REPO_DIR/target/${PROFILE/#dev/debug}/$1"; }

# build_bench EXAMPLE...: the node and the programs that measure it.
build_bench() {
  need_root
  need_command cargo "install Rust: https://rustup.rs"
  need_packages curl ca-certificates gcc libc6-dev make iproute2 iptables procps util-linux openssl
  (cd "$REPO_DIR" && run_logged "cargo build --profile $PROFILE" "$CACHE/log/bench-build.log" cargo build --profile "$PROFILE" --locked --bin lambdalet "${@/#/--example=}") ||
    fail "lambdalet does not build"
}

# start_cluster IMAGE...: Docker with these images, and a control plane.
start_cluster() {
  ensure_docker bench
  "$HACK_DIR/images" "$@"
  # Node ranges wide enough for the largest burst.
  "$HACK_DIR/cluster" --dir "$DIR" up
  mkdir -p "$RESULTS"
}

# Lines of the node's configuration besides the usual ones.
NODE_CONFIG=''

# start_node NAME [FLAGS...]: lambdalet, Ready; its API listens on port $NODE_PORT.
start_node() {
  local name=$1 kubeconfig
  shift
  kubeconfig=$("$HACK_DIR/cluster" --dir "$DIR" node-kubeconfig "$name")
  NODE_PORT=$(free_ports 1)
  mkdir -p "$DIR/run"
  guest_config "$DIR/run/config.yaml"
  echo "$NODE_CONFIG" >>"$DIR/run/config.yaml"
  proc_start "$DIR/run" lambdalet "$(built lambdalet)" run --kubeconfig "$kubeconfig" \
    --config "$DIR/run/config.yaml" --node-name "$name" \
    --node-ip "$(host_address)" --port "$NODE_PORT" --root-dir "$DIR/root" --max-pods 150 --client-ca-file "$DIR/ca.crt" \
    --drain-on-exit "$@"
  proc_ready "$DIR/run" lambdalet 60 node_ready "$name" || fail "lambdalet does not become Ready" "read $DIR/run/lambdalet.log"
}

# stop_node NAME
stop_node() {
  proc_stop "$DIR/run" lambdalet
  kubectl delete node "$1" >/dev/null
}

# end_bench: what is left to stop, whatever happened.
end_bench() {
  proc_stop "$DIR/run" lambdalet 2>/dev/null || true
  mkdir -p "$CACHE/bench" && cp "$RESULTS"/* "$CACHE/bench/" 2>/dev/null || true
  "$HACK_DIR/cluster" --dir "$DIR" down || true
  release_docker bench
}
