# shellcheck shell=bash
# The Docker daemon for the scripts in hack/. Sourced by lib.sh.
#
# A daemon that already runs is used and left alone. One that these scripts
# start is stopped when the last of its users lets go of it. A network namespace
# ($NETNS) has a daemon of its own, which keeps all in DOCKER_STATE and DOCKER_RUN.

DOCKER_STATE=$STATE/docker
DOCKER_RUN=/var/run

docker_answers() { curl -fsS --max-time 5 --unix-socket "$DOCKER_RUN/docker.sock" http://docker/_ping; }

# ensure_docker USER: Docker installed, running, and kept for USER.
ensure_docker() {
  local user=$1
  need_root
  need_packages curl ca-certificates procps
  mkdir -p "$DOCKER_STATE/users"
  if ! docker_answers >/dev/null 2>&1; then
    command -v dockerd >/dev/null || need_packages docker.io iptables iproute2
    start_dockerd
  fi
  command -v docker >/dev/null || need_packages docker.io
  : >"$DOCKER_STATE/users/$user"
  docker_env
}

start_dockerd() {
  local own=()
  if [ -z "$NETNS" ]; then remember_network; else
    mkdir -p "$DOCKER_RUN"
    # Not the host's: it may name directories that are in use.
    echo '{}' >"$DOCKER_STATE/daemon.json"
    own=(--config-file "$DOCKER_STATE/daemon.json" --storage-driver "$DOCKER_DRIVER" --host "unix://$DOCKER_RUN/docker.sock"
      --bip "$DOCKER_BRIDGE" --data-root "$DOCKER_STATE/data" --exec-root "$DOCKER_RUN/exec" --pidfile "$DOCKER_RUN/docker.pid")
  fi
  if [ -z "$NETNS" ] && [ -d /run/systemd/system ]; then
    say "starting docker with systemd"
    # Installing the package may have started it a moment ago.
    systemctl start docker >/dev/null 2>&1 || fail "systemd could not start docker" "journalctl -u docker"
    echo systemd >"$DOCKER_STATE/started"
  else
    need_cgroups
    say "starting dockerd${NETNS:+ in $NETNS}"
    # containerd and dockerd leave their pid files when they are killed.
    proc_start "$DOCKER_STATE" dockerd dockerd "${own[@]}"
    echo process >"$DOCKER_STATE/started"
    proc_ready "$DOCKER_STATE" dockerd 60 docker_answers ||
      fail "dockerd does not start" "read $DOCKER_STATE/dockerd.log"
  fi
  wait_for 60 "the Docker socket" docker_answers || fail "Docker does not answer on $DOCKER_RUN/docker.sock"
}

# Without an init system nobody may have mounted the cgroup hierarchy: version 2
# where its controllers are free, else one mount per controller.
need_cgroups() {
  if grep -q ' /sys/fs/cgroup' /proc/mounts; then return 0; fi
  say "mounting cgroups on /sys/fs/cgroup"
  if mount -t cgroup2 cgroup2 /sys/fs/cgroup; then
    ! grep -qw memory /sys/fs/cgroup/cgroup.controllers || return 0
    umount /sys/fs/cgroup
  fi
  mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
  awk '!/^#/ && $4 == 1 {print $1}' /proc/cgroups | while read -r controller; do
    mkdir -p "/sys/fs/cgroup/$controller"
    mount -t cgroup -o "$controller" cgroup "/sys/fs/cgroup/$controller" || rmdir "/sys/fs/cgroup/$controller"
  done
}

# A new CLI in front of an old daemon: speak the daemon's version, and do not
# ask it for BuildKit, which Debian 12's daemon does not serve.
docker_env() {
  local api
  api=$(curl -fsS --unix-socket "$DOCKER_RUN/docker.sock" http://docker/version |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["ApiVersion"])')
  if [ "$(printf '%s\n1.44\n' "$api" | sort -V | head -n 1)" != 1.44 ]; then
    export DOCKER_API_VERSION=$api DOCKER_BUILDKIT=0
  fi
}

# release_docker USER: the counterpart of ensure_docker.
release_docker() {
  rm -f "$DOCKER_STATE/users/$1"
  rmdir "$DOCKER_STATE/users" 2>/dev/null || [ ! -d "$DOCKER_STATE/users" ] || return 0
  if [ ! -f "$DOCKER_STATE/started" ]; then
    rmdir "$DOCKER_STATE" 2>/dev/null || true
    return 0
  fi
  say "stopping the docker daemon that was started here${NETNS:+, in $NETNS}"
  if [ "$(cat "$DOCKER_STATE/started")" = systemd ]; then
    systemctl stop docker.socket docker >/dev/null 2>&1 || true
  else
    proc_stop "$DOCKER_STATE" dockerd 30
  fi
  if [ -z "$NETNS" ]; then forget_network; else
    unmount_below "$DOCKER_RUN" "$DOCKER_STATE"
    rm -rf "$DOCKER_RUN"
  fi
  rm -rf "$DOCKER_STATE"
}

# dockerd leaves its bridge, its iptables chains and a FORWARD policy of DROP
# behind. What was not there before it goes away again.
remember_network() {
  {
    echo "ip_forward $(cat /proc/sys/net/ipv4/ip_forward)"
    ! ip link show docker0 >/dev/null 2>&1 || echo "docker0 here"
    iptables -w -S FORWARD 2>/dev/null | awk '$1 == "-P" { print "forward", $3 }'
  } >"$DOCKER_STATE/network"
}

network_before() { awk -v key="$1" '$1 == key { print $2 }' "$DOCKER_STATE/network" 2>/dev/null; }

forget_network() {
  local table
  # With the bridge there before, somebody else's rules may be among these.
  if [ ! -s "$DOCKER_STATE/network" ] || [ -n "$(network_before docker0)" ]; then return 0; fi
  ip link delete docker0 2>/dev/null || true
  for table in filter nat; do
    iptables -w -t "$table" -S | grep -E -- '-(i|o) docker0( |$)|-j DOCKER' | sed -n 's/^-A /-D /p' | while read -r rule; do
      # shellcheck disable=SC2086 # a rule is many words
      iptables -w -t "$table" $rule 2>/dev/null || true
    done
    iptables -w -t "$table" -S | awk '$1 == "-N" && $2 ~ /^DOCKER/ { print $2 }' | while read -r chain; do
      iptables -w -t "$table" -F "$chain"
      iptables -w -t "$table" -X "$chain" 2>/dev/null || true
    done
  done
  iptables -w -P FORWARD "$(network_before forward | grep . || echo ACCEPT)"
  sysctl -qw "net.ipv4.ip_forward=$(network_before ip_forward)"
}
