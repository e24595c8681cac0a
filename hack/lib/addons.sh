# shellcheck shell=bash
# kube-proxy and CoreDNS as processes on the host. Sourced by hack/cluster.
#
# kube-proxy owns chains of the host's iptables, so one cluster per host may have
# it; $STATE/addons names that cluster.

ADDONS_OWNER=$STATE/addons

addons() {
  local command=${1:-}
  [ $# -eq 0 ] || shift
  case $command in
    up) addons_up "$@" ;;
    down) addons_down "$@" ;;
    *) fail "addons: up or down?" "hack/cluster --help" ;;
  esac
}

addons_up() {
  local node=hack-host address=$HOST_ADDRESS owner
  while [ $# -gt 0 ]; do
    case $1 in
      --node) node=$2 ;;
      --netns) NETNS=$2 ;;
      --address) address=$2 ;;
      *) fail "addons up does not know '$1'" "hack/cluster --help" ;;
    esac
    shift 2
  done
  owner=$(cat "$ADDONS_OWNER" 2>/dev/null || true)
  if [ -n "$owner" ] && [ "$owner" != "$DIR" ] && [ -d "$owner" ]; then
    fail "the cluster in $owner has kube-proxy on this host" "hack/cluster --dir $owner addons down"
  fi
  if proc_alive "$DIR/run" "$(proxy_name)" && proc_alive "$DIR/run" coredns; then
    say "addons are already up${NETNS:+ in $NETNS}"
    return
  fi
  need_packages iptables iproute2 procps kmod curl
  "$HACK_DIR/build-tools" addons
  if [ -z "$NETNS" ]; then
    echo "$DIR" >"$ADDONS_OWNER"
    ! iptables -w -n -L KUBE-FIREWALL >/dev/null 2>&1 || : >"$DIR/run/had-firewall-chain"
    start_coredns
  elif [ "$owner" != "$DIR" ]; then
    fail "this host has no kube-proxy of this cluster" "hack/cluster --dir $DIR addons up"
  fi
  route_bridged_traffic
  keep_services_here
  start_kube_proxy "$node" "$address"
  [ -z "${STAND_IN:-}" ] || kubectl_admin delete node "$STAND_IN" --ignore-not-found >/dev/null
  wait_for 20 "cluster DNS at $DNS_IP" dns_answers "$DNS_IP" 53 ||
    { show_tail "$DIR/run/$(proxy_name).log"; fail "the kube-dns Service does not answer"; }
  say "addons are up: Services work on this host${NETNS:+ in $NETNS}, cluster DNS is $DNS_IP"
}

addons_down() {
  local file
  if [ "$(cat "$ADDONS_OWNER" 2>/dev/null)" != "$DIR" ]; then return 0; fi
  if [ "${1:-}" = --netns ]; then
    # What it has made goes away with the namespace.
    proc_stop "$DIR/run" "kube-proxy-$2"
    return
  fi
  say "stopping kube-proxy and CoreDNS"
  for file in "$DIR"/run/kube-proxy*.pid; do
    [ ! -e "$file" ] || proc_stop "$DIR/run" "$(basename "$file" .pid)"
  done
  proc_stop "$DIR/run" coredns
  "$(tool kube-proxy)" --cleanup >>"$DIR/run/kube-proxy.log" 2>&1 || warn "kube-proxy --cleanup failed, see $DIR/run/kube-proxy.log"
  [ -e "$DIR/run/had-firewall-chain" ] || drop_firewall_chain
  let_services_go
  restore_sysctls
  rm -f "$ADDONS_OWNER"
}

# Both kube-proxy and a kubelet make this chain and leave it, for the other may
# still use it.
drop_firewall_chain() {
  local iptables hook
  for iptables in iptables ip6tables; do
    "$iptables" -w -n -L KUBE-FIREWALL >/dev/null 2>&1 || continue
    for hook in INPUT OUTPUT; do "$iptables" -w -D "$hook" -j KUBE-FIREWALL 2>/dev/null || true; done
    "$iptables" -w -F KUBE-FIREWALL
    "$iptables" -w -X KUBE-FIREWALL
  done
}

# A port that a Service does not have is no rule of kube-proxy's: what goes there would leave by the host's default route,
# where anything may answer.
keep_services_here() {
  let_services_go
  refuse_other_ports -I
}

let_services_go() { refuse_other_ports -D 2>/dev/null || true; }

refuse_other_ports() { # -I or -D
  local chain
  for chain in FORWARD OUTPUT; do
    in_netns iptables -w "$1" "$chain" -d "$SERVICE_CIDR" -m comment --comment "not a port of a Service" -j REJECT
  done
}

# Two Pods on one bridge that talk through a Service: the answer crosses the
# bridge only, and must meet iptables there to be translated back.
route_bridged_traffic() {
  local key
  modprobe br_netfilter 2>/dev/null || true
  # A namespace of its own goes away with what is set in it.
  for key in net.ipv4.ip_forward net.bridge.bridge-nf-call-iptables; do
    if ! in_netns sysctl -n "$key" >/dev/null 2>&1; then
      warn "this kernel has no $key: Pods on one bridge will not reach each other through a Service"
      continue
    fi
    [ "$(in_netns sysctl -n "$key")" != 1 ] || continue
    [ -n "$NETNS" ] || echo "$key=$(sysctl -n "$key")" >>"$DIR/run/sysctls"
    in_netns sysctl -qw "$key=1"
  done
}

restore_sysctls() {
  local setting
  [ -s "$DIR/run/sysctls" ] || return 0
  while read -r setting; do sysctl -qw "$setting"; done <"$DIR/run/sysctls"
  rm -f "$DIR/run/sysctls"
}

# One for each network namespace.
proxy_name() { echo "kube-proxy${NETNS:+-$NETNS}"; }

start_kube_proxy() { # NODE ADDRESS
  local health metrics name
  name=$(proxy_name)
  # In another namespace loopback does not lead to the API server.
  [ -z "$NETNS" ] || local APISERVER_URL=https://$HOST_ADDRESS:$APISERVER_PORT
  identity "$DIR/kubeconfigs/$name.kubeconfig" system:kube-proxy
  if proc_alive "$DIR/run" "$name"; then return 0; fi
  read -r health metrics < <(free_ports 2)
  stand_in_for "$1" "$2"
  start_component "$name" 60 "in_netns curl -fsS --noproxy 127.0.0.1 http://127.0.0.1:$health/livez" -- "$(tool kube-proxy)" \
    --kubeconfig="$DIR/kubeconfigs/$name.kubeconfig" --hostname-override="$1" \
    --proxy-mode=iptables --cluster-cidr="$CLUSTER_CIDR" --bind-address="$2" \
    --healthz-bind-address="127.0.0.1:$health" --metrics-bind-address="127.0.0.1:$metrics" \
    --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0s --conntrack-tcp-timeout-close-wait=0s
}

# kube-proxy sits out half a minute when its Node does not exist yet, and does
# not mind when it goes away later. So it gets one to look at while it starts.
stand_in_for() { # NODE ADDRESS
  ! kubectl_admin get node "$1" >/dev/null 2>&1 || return 0
  STAND_IN=$1
  kubectl_admin create -f - >/dev/null <<EOF
{apiVersion: v1, kind: Node, metadata: {name: $1}, spec: {unschedulable: true}}
EOF
  kubectl_admin patch node "$1" --subresource=status --type=merge \
    -p "{\"status\": {\"addresses\": [{\"type\": \"InternalIP\", \"address\": \"$2\"}]}}" >/dev/null
}

start_coredns() {
  local port health
  identity "$DIR/kubeconfigs/coredns.kubeconfig" hack:coredns
  if ! proc_alive "$DIR/run" coredns; then
    read -r port health < <(free_ports 2)
    corefile "$port" "$health" >"$DIR/run/Corefile"
    printf '%s %s\n' "$port" "$health" >"$DIR/run/coredns.ports"
  fi
  read -r port health <"$DIR/run/coredns.ports"
  dns_objects "$port" | kubectl_admin apply --server-side --field-manager=hack -f - >/dev/null
  start_component coredns 30 "curl -fsS --noproxy 127.0.0.1 http://127.0.0.1:$health/ready" -- "$(tool coredns)" -conf "$DIR/run/Corefile"
}

corefile() { # PORT HEALTH-PORT
  cat <<EOF
.:$1 {
    bind $HOST_ADDRESS
    errors
    ready 127.0.0.1:$2
    kubernetes $CLUSTER_DOMAIN in-addr.arpa ip6.arpa {
        kubeconfig $DIR/kubeconfigs/coredns.kubeconfig
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 5
    }
$(if grep -q '^nameserver' /etc/resolv.conf; then echo "    forward . /etc/resolv.conf"; fi)
    cache 5
    loadbalance
}
EOF
}

# CoreDNS listens on the host, so its Service has no selector and its endpoints
# are written by hand.
dns_objects() { # PORT
  cat <<EOF
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: hack:coredns}
rules:
- {apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: hack:coredns}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: hack:coredns}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: hack:coredns}]
---
apiVersion: v1
kind: Service
metadata:
  name: kube-dns
  namespace: kube-system
  labels: {k8s-app: kube-dns, kubernetes.io/name: CoreDNS}
spec:
  clusterIP: $DNS_IP
  ports:
  - {name: dns, port: 53, protocol: UDP}
  - {name: dns-tcp, port: 53, protocol: TCP}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: kube-dns-host
  namespace: kube-system
  labels: {kubernetes.io/service-name: kube-dns}
addressType: IPv4
endpoints:
- addresses: [$HOST_ADDRESS]
  conditions: {ready: true}
ports:
- {name: dns, port: $1, protocol: UDP}
- {name: dns-tcp, port: $1, protocol: TCP}
EOF
}

# dns_answers SERVER PORT: ask over UDP for the API server's name.
dns_answers() {
  in_netns python3 - "$1" "$2" "kubernetes.default.svc.$CLUSTER_DOMAIN" <<'EOF'
import socket, struct, sys
server, port, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(1)
s.sendto(struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1", (server, port))
answer = s.recv(512)
_, flags, _, answers, _, _ = struct.unpack(">6H", answer[:12])
sys.exit(0 if flags & 0xF == 0 and answers else 1)
EOF
}
