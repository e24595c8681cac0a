# shellcheck shell=bash
# Certificates and kubeconfigs of one cluster, made with openssl. Sourced by
# hack/cluster; DIR is the cluster's directory.

# Elliptic keys: a certificate takes 20 ms, an RSA one would take 200.
new_key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null ||
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null; }

make_ca() {
  [ ! -s "$DIR/ca.crt" ] || return 0
  new_key "$DIR/ca.key"
  openssl req -x509 -new -key "$DIR/ca.key" -sha256 -days 3650 -subj "/CN=lambdalet-hack-ca" \
    -addext "keyUsage=critical,digitalSignature,keyCertSign,cRLSign" -out "$DIR/ca.crt"
}

# sign NAME SUBJECT USAGE [SAN]: DIR/pki/NAME.{key,crt}, signed by the cluster's CA.
sign() {
  local base=$DIR/pki/$1 subject=$2 usage=$3 san=${4:-}
  [ ! -s "$base.crt" ] || return 0
  new_key "$base.key"
  {
    echo "basicConstraints=critical,CA:FALSE"
    echo "keyUsage=critical,digitalSignature,keyEncipherment"
    echo "extendedKeyUsage=$usage"
    [ -z "$san" ] || echo "subjectAltName=$san"
  } >"$base.ext"
  openssl req -new -key "$base.key" -subj "$subject" -out "$base.csr"
  openssl x509 -req -in "$base.csr" -CA "$DIR/ca.crt" -CAkey "$DIR/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
    -days 365 -sha256 -extfile "$base.ext" -out "$base.crt.tmp" 2>/dev/null || fail "could not sign a certificate for $subject"
  mv "$base.crt.tmp" "$base.crt"
  rm -f "$base.csr" "$base.ext"
}

# Names and addresses under which the API server is reached: from the host, from
# Pods on any bridge that exists now, and as the "kubernetes" Service.
server_names() {
  local address names
  names="DNS:localhost,DNS:$(hostname),DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
  names+=",DNS:kubernetes.default.svc.cluster.local,IP:127.0.0.1,IP:$SERVICE_IP,IP:$HOST_ADDRESS,IP:172.17.0.1"
  for address in $(ip -4 -o addr show scope global | awk '{sub("/.*", "", $4); print $4}'); do
    [[ ",$names," == *",IP:$address,"* ]] || names+=",IP:$address"
  done
  echo "$names"
}

make_server_pki() {
  make_ca
  sign apiserver "/CN=kube-apiserver" serverAuth "$(server_names)"
  sign kubelet-client "/CN=kube-apiserver-kubelet-client" clientAuth
  # What the API server is to the servers it stands before.
  sign front-proxy-client "/CN=front-proxy-client" clientAuth
  [ -s "$DIR/pki/service-account.key" ] || {
    openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out "$DIR/pki/service-account.key" 2>/dev/null
    openssl pkey -in "$DIR/pki/service-account.key" -pubout -out "$DIR/pki/service-account.pub"
  }
}

# identity FILE USER [GROUP...]: a kubeconfig whose client certificate says so.
identity() {
  local file=$1 user=$2 group subject="" name
  shift 2
  [ ! -s "$file" ] || return 0
  for group in "$@"; do subject+="/O=${group//\//\\/}"; done
  subject+="/CN=${user//\//\\/}"
  name=$(basename "$file" .kubeconfig)
  sign "$name" "$subject" clientAuth
  kubeconfig_of "$file" "$user" "    client-certificate-data: $(base64 -w0 "$DIR/pki/$name.crt")
    client-key-data: $(base64 -w0 "$DIR/pki/$name.key")"
}

# kubeconfig_of FILE USER CREDENTIALS: the lines of CREDENTIALS are indented by four.
kubeconfig_of() {
  local file=$1 user=$2 credentials=$3
  (
    umask 077
    cat >"$file.tmp" <<EOF
apiVersion: v1
kind: Config
current-context: hack
clusters:
- name: hack
  cluster:
    server: $APISERVER_URL
    certificate-authority-data: $(base64 -w0 "$DIR/ca.crt")
contexts:
- name: hack
  context: {cluster: hack, user: "$user"}
users:
- name: "$user"
  user:
$credentials
EOF
  )
  mv "$file.tmp" "$file"
}
