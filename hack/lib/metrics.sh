# shellcheck shell=bash
# metrics-server as a process on the host, behind the API server's aggregation
# layer, for `kubectl top`. Sourced by hack/cluster.
#
# While its APIService exists but does not answer, the namespace controller waits
# for it: so it comes last when starting, and goes first when stopping.

METRICS_SERVICE=v1beta1.metrics.k8s.io

metrics() {
  case ${1:-} in
    up) metrics_up ;;
    down) metrics_down ;;
    *) fail "metrics: up or down?" "hack/cluster --help" ;;
  esac
}

metrics_up() {
  local port kubeconfig=$DIR/kubeconfigs/metrics-server.kubeconfig
  "$HACK_DIR/build-tools" metrics
  # Tests that run at once may ask for it at once.
  take_lock "metrics-$(echo "$DIR" | cksum | cut -d' ' -f1)"
  sign metrics-server "/CN=metrics-server" serverAuth "DNS:metrics-server.kube-system.svc,IP:127.0.0.1"
  proc_alive "$DIR/run" metrics-server || free_ports 1 >"$DIR/run/metrics-server.port"
  read -r port <"$DIR/run/metrics-server.port"
  metrics_objects "$port" | kubectl_admin apply --server-side --field-manager=hack -f - >/dev/null
  # As in a Pod it comes with a token, not with a certificate: nodes have to review it.
  [ -s "$kubeconfig" ] || kubeconfig_of "$kubeconfig" metrics-server \
    "    token: $(kubectl_admin -n kube-system create token metrics-server --duration=24h)"
  start_component metrics-server 60 "metrics_live $port" -- "$(tool metrics-server)" --kubeconfig="$kubeconfig" \
    --authentication-kubeconfig="$kubeconfig" --authorization-kubeconfig="$kubeconfig" --secure-port="$port" \
    --tls-cert-file="$DIR/pki/metrics-server.crt" --tls-private-key-file="$DIR/pki/metrics-server.key" \
    --kubelet-preferred-address-types=InternalIP --kubelet-use-node-status-port --kubelet-insecure-tls \
    --metric-resolution=10s --kubelet-request-timeout=8s
  metrics_api_service | kubectl_admin apply --server-side --field-manager=hack -f - >/dev/null
  wait_for 30 "the API server to reach metrics-server" kubectl_admin get --raw /apis/metrics.k8s.io/v1beta1 || {
    show_tail "$DIR/run/metrics-server.log"
    fail "metrics.k8s.io does not answer" "hack/cluster --dir $DIR kubectl get apiservice $METRICS_SERVICE -o yaml"
  }
  drop_lock
  say "metrics-server is up: kubectl top knows a Pod once it was looked at twice, ten seconds apart"
}

metrics_live() { # PORT
  curl -fsS --max-time 5 --noproxy '*' --cacert "$DIR/ca.crt" "https://127.0.0.1:$1/livez"
}

metrics_down() {
  proc_alive "$DIR/run" metrics-server || return 0
  say "stopping metrics-server"
  kubectl_admin delete apiservice "$METRICS_SERVICE" --ignore-not-found >/dev/null 2>&1 || true
  proc_stop "$DIR/run" metrics-server
}

metrics_api_service() {
  cat <<EOF
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: $METRICS_SERVICE}
spec:
  group: metrics.k8s.io
  version: v1beta1
  groupPriorityMinimum: 100
  versionPriority: 100
  service: {name: metrics-server, namespace: kube-system}
  caBundle: $(base64 -w0 "$DIR/ca.crt")
EOF
}

# Its rights are those it asks for in a cluster. The Service has no selector: what
# it leads to is written by hand, as for cluster DNS.
metrics_objects() { # PORT
  cat <<EOF
apiVersion: v1
kind: ServiceAccount
metadata: {name: metrics-server, namespace: kube-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: "hack:metrics-server"}
rules:
- {apiGroups: [""], resources: [nodes/metrics], verbs: [get]}
- {apiGroups: [""], resources: [pods, nodes], verbs: [get, list, watch]}
---
$(bind_metrics ClusterRoleBinding "" ClusterRole hack:metrics-server)
---
$(bind_metrics ClusterRoleBinding "" ClusterRole system:auth-delegator)
---
$(bind_metrics RoleBinding kube-system Role extension-apiserver-authentication-reader)
---
apiVersion: v1
kind: Service
metadata: {name: metrics-server, namespace: kube-system}
spec:
  ports:
  - {name: https, port: 443, protocol: TCP, targetPort: $1}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: metrics-server-host
  namespace: kube-system
  labels: {kubernetes.io/service-name: metrics-server}
addressType: IPv4
endpoints:
- addresses: [$HOST_ADDRESS]
  conditions: {ready: true}
ports:
- {name: https, port: $1, protocol: TCP}
EOF
}

bind_metrics() { # KIND NAMESPACE ROLE-KIND ROLE
  cat <<EOF
apiVersion: rbac.authorization.k8s.io/v1
kind: $1
metadata: {name: "hack:metrics-server:${4##*:}"${2:+, namespace: $2}}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: $3, name: "$4"}
subjects: [{kind: ServiceAccount, name: metrics-server, namespace: kube-system}]
EOF
}
