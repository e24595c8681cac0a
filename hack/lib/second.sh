# shellcheck shell=bash
# A second host on this one, for a second node: a network namespace with a cable to
# the host, and a Docker daemon of its own in it. Sourced by hack/conformance.
#
#   host, node 1                      namespace hacknode2, node 2
#   hacknode2 10.243.0.1/30  -------  eth0 10.243.0.2/30
#   its Pods' range via .2            everything via .1
#
# The kernel, the files, the processes and the cgroups are the same for both, and so is
# what the nodes say they have: what one uses, the other does not see as used.

SECOND=hacknode2
SECOND_ADDRESS=10.243.0.2
SECOND_GATEWAY=10.243.0.1
# Docker's own: by default it would take a range that the host may be in.
SECOND_BRIDGE=10.243.1.1/24

# on_second FUNCTION ARGS...: for the second host and its Docker daemon.
on_second() {
  # shellcheck disable=SC2034 # DOCKER_STATE: what is called reads it
  local NETNS=$SECOND DOCKER_STATE=$STATE/docker-$SECOND DOCKER_RUN=/run/lambdalet-$SECOND
  DOCKER_HOST=unix://$DOCKER_RUN/docker.sock "$@"
}

second_there() { [ -e "/run/netns/$SECOND" ]; }

# second_up USER IMAGE...: it is there, and its daemon has these images of the first one's.
second_up() {
  local user=$1 DOCKER_DRIVER DOCKER_BRIDGE=$SECOND_BRIDGE
  shift
  need_packages iproute2 iptables util-linux
  if ! second_there; then
    say "making the network namespace $SECOND"
    ip netns add "$SECOND"
    ip link add "$SECOND" type veth peer name eth0 netns "$SECOND"
    ip addr add "$SECOND_GATEWAY/30" dev "$SECOND"
    ip link set "$SECOND" up
    ip -n "$SECOND" link set lo up
    ip -n "$SECOND" addr add "$SECOND_ADDRESS/30" dev eth0
    ip -n "$SECOND" link set eth0 up
    ip -n "$SECOND" route add default via "$SECOND_GATEWAY"
  fi
  DOCKER_DRIVER=$(docker info -f '{{.Driver}}')
  on_second ensure_docker "$user"
  second_images "$@"
}

second_images() { # IMAGE...
  local image missing=()
  for image in "$@"; do
    [ "$(image_id "$image")" = "$(on_second image_id "$image")" ] || missing+=("$image")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "copying ${#missing[@]} images to $SECOND"
  docker save "${missing[@]}" | on_second docker load >/dev/null
}

image_id() { docker image inspect -f '{{.Id}}' "$1" 2>/dev/null || true; }

# second_route RANGE: the host finds the second one's Pods, which have this range; the second one finds all by its default.
second_route() { ip route replace "$1" via "$SECOND_ADDRESS"; }

# second_down USER: nothing of it is left. The host's end of the cable takes the routes with it.
second_down() {
  local pid
  on_second release_docker "$1"
  second_there || return 0
  say "removing the network namespace $SECOND"
  for pid in $(ip netns pids "$SECOND"); do
    warn "ending a left-over process in $SECOND: $(ps -o pid=,args= -p "$pid" | cut -c1-90)"
    kill -KILL "$pid" 2>/dev/null || true
  done
  ip link delete "$SECOND" 2>/dev/null || true
  ip netns delete "$SECOND"
  # Mounted by the first `ip netns add` on a host.
  [ -n "$(ls -A /run/netns)" ] || { umount /run/netns && rmdir /run/netns; } 2>/dev/null || true
}
