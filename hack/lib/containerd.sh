# shellcheck shell=bash
# A containerd of one's own beside whatever else runs on the host. Sourced by the
# scripts that measure or compare with one, or have a node run Pods on one.
#
# D is the directory that holds what it keeps, R one for its sockets and state: a
# socket's path may not be longer than 107 bytes, so R is short.

containerd_tool() { "$HACK_DIR/build-tools" --path "$1"; }

ctr_of() { # R ARGS...
  local run=$1
  shift
  "$(containerd_tool ctr)" --address "$run/containerd.sock" --namespace k8s.io "$@"
}

# containerd_start D R [IMAGE...]: containerd answers CRI on R/containerd.sock, and has
# these images of Docker's, where that has them. It plugs its Pods in as D/cni says, with
# the plug-ins of the CNI project and those in D/bin.
containerd_start() {
  local dir=$1 run=$2
  shift 2
  need_packages containernetworking-plugins iptables iproute2 util-linux
  command -v runc >/dev/null || need_packages runc
  "$HACK_DIR/build-tools" containerd containerd-shim-runc-v2 ctr
  mkdir -p "$dir/cni" "$run"
  cat >"$dir/containerd.toml" <<TOML
version = 3
root = "$dir/containerd"
state = "$run/state"
[grpc]
  address = "$run/containerd.sock"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "lambdalet.test/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
  # Without CAP_SYS_RESOURCE a score cannot be lowered, and runc dies of trying.
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["/usr/lib/cni", "$dir/bin"]
  conf_dir = "$dir/cni"
TOML
  say "starting containerd"
  # containerd looks for its shim in PATH.
  PATH=$(dirname "$(containerd_tool containerd)"):$PATH proc_start "$dir" containerd "$(containerd_tool containerd)" --config "$dir/containerd.toml"
  proc_ready "$dir" containerd 30 ctr_of "$run" version || fail "containerd does not start" "read $dir/containerd.log"
  containerd_copy "$dir" "$run" "$@"
}

# containerd_copy D R IMAGE...: it has these images of Docker's from now on, where that has them.
containerd_copy() {
  local dir=$1 run=$2 image
  shift 2
  for image in "$@"; do
    docker image inspect "$image" >/dev/null 2>&1 || continue
    say "copying $image"
    docker save "$image" | ctr_of "$run" images import - >/dev/null 2>>"$dir/ctr.log" || fail "could not copy $image" "read $dir/ctr.log"
  done
}

# containerd_network D BRIDGE CIDR: what it plugs its Pods into. It sees the file by itself.
containerd_network() {
  cat >"$1/cni/10-hack.conflist" <<JSON
{
  "cniVersion": "1.0.0", "name": "hack-$2",
  "plugins": [
    {
      "type": "bridge", "bridge": "$2", "isGateway": true, "ipMasq": true, "hairpinMode": true,
      "ipam": {"type": "host-local", "ranges": [[{"subnet": "$3"}]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "$1/ipam"}
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
JSON
  forward_bridge -I "$2"
}

# Docker drops what it does not know in FORWARD.
forward_bridge() { # -I or -D, BRIDGE
  iptables -w "$1" FORWARD -i "$2" -j ACCEPT 2>/dev/null || true
  iptables -w "$1" FORWARD -o "$2" -j ACCEPT 2>/dev/null || true
}

# sweep_plugins BRIDGE: what the plug-ins have made for Pods that nobody came to unplug.
sweep_plugins() {
  local result space id chain number
  for result in /var/lib/cni/results/hack-"$1"-*; do
    [ -f "$result" ] || continue
    space=$(grep -o '"netns":"[^"]*"' "$result" | sed 's/.*\///; s/"//') || true
    # Its mount may have gone before its file.
    [ -z "$space" ] || ip netns delete "$space" 2>/dev/null || rm -f "/run/netns/$space" || true
    id=${result#*/hack-"$1"-} id=${id%-*}
    rm -f "$result" "/var/lib/cni/results/cni-loopback-$id-lo"
  done
  command -v iptables >/dev/null || return 0
  iptables -w -t nat -L POSTROUTING -n --line-numbers | awk -v name="hack-$1" 'index($0, "\"" name "\"") { print $1, $2 }' | sort -rn |
    while read -r number chain; do
      iptables -w -t nat -D POSTROUTING "$number" && iptables -w -t nat -F "$chain" && iptables -w -t nat -X "$chain" || true
    done
}

# containerd_stop D R [BRIDGE]: ends it and all that runs in it, and removes what it left on the host.
containerd_stop() {
  local dir=$1 run=$2 bridge=${3:-} task shim
  if proc_alive "$dir" containerd; then
    for task in $(ctr_of "$run" tasks ls -q); do ctr_of "$run" tasks rm -f "$task" >/dev/null 2>&1 || true; done
    say "stopping containerd"
    proc_stop "$dir" containerd
  fi
  # It forgets shims of starts that were given up halfway.
  for shim in $(pgrep -f -- "^[^ ]*containerd-shim-runc-v2 .*-address $run/containerd.sock"); do kill -KILL "$shim" 2>/dev/null || true; done
  unmount_below "$dir" "$run"
  if [ -n "$bridge" ]; then
    sweep_plugins "$bridge"
    forward_bridge -D "$bridge"
    ip link delete "$bridge" 2>/dev/null || true
  fi
  rm -rf "$dir/containerd" "$run"
  # Made whatever the flags say; gone again unless somebody else uses them.
  rmdir /var/lib/cni/results /var/lib/cni 2>/dev/null || true
}
