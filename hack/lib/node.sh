# shellcheck shell=bash
# How a lambdalet node is to be on a host that has other work, and what one leaves
# there when it was killed. Sourced by the scripts that start one.

# guest_config FILE: the configuration of a node that neither refuses Pods nor removes
# images because somebody else has nearly filled the disk.
guest_config() {
  cat >"$1" <<'YAML'
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, nodefs.inodesFree: 1%}
imageGCHighThresholdPercent: 100
YAML
}

# As the node makes it, from the record it keeps in its root directory.
owner_word() { # ROOT-DIR
  python3 - "$1/owner.json" <<'PY'
import hashlib, json, sys
record = json.load(open(sys.argv[1]))
print(hashlib.sha256(f"{record['cluster']}/{record['node']}".encode()).hexdigest()[:12])
PY
}

# sweep_node ROOT-DIR: remove everything on the host that names this node's owner
# word, in case the node was killed or could not finish.
sweep_node() {
  local root=$1 owner id target link table
  owner=$(owner_word "$root" 2>/dev/null) || return 0
  if docker_answers >/dev/null 2>&1; then
    for id in $(docker ps -aq --filter "label=lambdalet.dev/owner=$owner"); do
      warn "removing left-over container $id"
      docker rm -f "$id" >/dev/null
    done
  fi
  findmnt -rno TARGET | awk -v root="$root/" 'index($0, root) == 1' | sort -r | while read -r target; do
    warn "unmounting left-over $target"
    umount -l "$target"
  done
  link=ll${owner:0:8}
  if ip link delete "$link" 2>/dev/null; then warn "removed left-over bridge $link"; fi
  nft delete table bridge "lambdalet_$link" 2>/dev/null || true
  for table in filter nat; do
    iptables -w -t "$table" -S | sed -n "/lambdalet:$link/s/^-A /-D /p" | xargs -r -L 1 iptables -w -t "$table"
  done
  # Empty by now; the kernel refuses to remove any that is not.
  find /sys/fs/cgroup -depth -type d -path "*/lambdalet-$owner*" -exec rmdir {} + 2>/dev/null || true
}
