# shellcheck shell=bash
# Shared by the scripts in hack/ and .ci/. Source it, do not run it.
#
# Everything here prints to stderr, so that a script's stdout stays an answer
# another script can use. What outlives one command is kept in two places:
#   CACHE  what is costly to make again and may be deleted at any time
#   STATE  what runs now: pid files, logs, certificates

set -euo pipefail

HACK_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export REPO_DIR
REPO_DIR=$(dirname "$HACK_DIR")
: "${HOME:=/root}"
export HOME
CACHE=${LAMBDALET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lambdalet}
STATE=${LAMBDALET_HACK_STATE:-/var/lib/lambdalet-hack}

# One clock for a script and all it calls, so the times of nested scripts line up.
: "${LAMBDALET_T0:=${EPOCHREALTIME/[.,]/}}"
export LAMBDALET_T0

# --- talking to the person in front of it ---------------------------------

# Milliseconds since the outermost script began.
elapsed_ms() { echo $(((${EPOCHREALTIME/[.,]/} - LAMBDALET_T0) / 1000)); }

say() {
  local ms
  ms=$(elapsed_ms)
  printf '[%4d.%01ds] %s\n' $((ms / 1000)) $((ms % 1000 / 100)) "$*" >&2
}

warn() { say "warning: $*"; }

# fail WHAT [WHAT-TO-DO]
fail() {
  say "error: $1"
  [ -z "${2:-}" ] || printf '          what to do: %s\n' "$2" >&2
  exit 1
}

show_tail() { # FILE [LINES]
  [ -s "$1" ] || return 0
  printf '          --- last lines of %s\n' "$1" >&2
  tail -n "${2:-20}" "$1" | sed 's/^/          | /' >&2
}

# run_logged LABEL LOG CMD...: run CMD with its output in LOG, and say every ten
# seconds that it still works, with the last line it wrote. CMD stays in the
# foreground, so that Ctrl-C reaches it.
run_logged() {
  local label=$1 log=$2 start=$SECONDS rc=0 watcher
  shift 2
  mkdir -p "$(dirname "$log")"
  say "$label ..."
  : >"$log"
  heartbeat "$label" "$log" 9>&- &
  watcher=$!
  "$@" >>"$log" 2>&1 </dev/null 9>&- || rc=$?
  kill "$watcher" 2>/dev/null || true
  wait "$watcher" 2>/dev/null || true
  if [ "$rc" -ne 0 ]; then
    say "error: $label failed (exit $rc) after $((SECONDS - start)) s"
    show_tail "$log" 40
    return "$rc"
  fi
  say "$label: done in $((SECONDS - start)) s"
}

heartbeat() { # LABEL LOG
  local start=$SECONDS beat=10
  while kill -0 $$ 2>/dev/null; do
    sleep 0.3
    [ $((SECONDS - start)) -ge "$beat" ] || continue
    beat=$((beat + 10))
    say "  $1: $((SECONDS - start)) s, $(wc -l <"$2") lines: $(tail -n 1 "$2" | cut -c1-90)"
  done
}

# wait_for SECONDS WHAT CMD...: poll CMD until it succeeds.
wait_for() {
  local limit=$1 what=$2 start=$SECONDS beat=5
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ $((SECONDS - start)) -ge "$limit" ]; then
      say "error: $what: not after $limit s"
      return 1
    fi
    if [ $((SECONDS - start)) -ge "$beat" ]; then
      beat=$((SECONDS - start + 5))
      say "  waiting for $what: $((SECONDS - start)) s of $limit s"
    fi
    sleep 0.1
  done
}

# --- one at a time --------------------------------------------------------

# take_lock NAME: hold a lock until this script ends. File descriptor 9 is
# closed in everything started in the background, or a daemon would keep it.
take_lock() {
  mkdir -p "$CACHE/lock"
  exec 9>"$CACHE/lock/$1"
  if ! flock -n 9; then
    say "another run holds the lock '$1': waiting for it"
    flock 9
  fi
}

drop_lock() { exec 9>&-; }

# --- the machine ----------------------------------------------------------

need_root() {
  [ "$(id -u)" -eq 0 ] || fail "this needs root (packages, dockerd, iptables)" "run it with sudo -E"
}

# need_packages NAME...: apt-get install what is missing, nothing else.
need_packages() {
  local package missing=()
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "missing: ${missing[*]}, and no apt-get" "install them with this system's package manager"
  need_root
  # The package lists may be absent or old; only then is an update worth its time.
  if apt-get install --simulate --no-install-recommends "${missing[@]}" >/dev/null 2>&1 && apt_install "${missing[@]}"; then
    return 0
  fi
  run_logged "apt-get update" "$CACHE/log/apt-update.log" apt-get update ||
    fail "apt-get update does not work" "check /etc/apt and the network"
  apt_install "${missing[@]}" || fail "could not install: ${missing[*]}" "read $CACHE/log/apt-install.log"
}

apt_install() {
  DEBIAN_FRONTEND=noninteractive run_logged "installing $*" "$CACHE/log/apt-install.log" \
    apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
}

# need_space GIB DIR WHAT: a full disk shows late, and as anything from a linker's crash to a corrupt database.
need_space() {
  local free
  mkdir -p "$2"
  free=$(($(df --output=avail -k "$2" | tail -n 1) >> 20))
  [ "$free" -ge "$1" ] || fail "$3 takes $1 GiB in $2, where $free are free" "make room there"
}

# need_room_to_build: for everything that is built of this tree, unless it was built before.
need_room_to_build() {
  [ -d "$REPO_DIR/target/debug/deps" ] || need_space 12 "$REPO_DIR/target" "a build of all tests"
}

need_command() { # NAME WHAT-TO-DO
  command -v "$1" >/dev/null || fail "$1 is not installed" "$2"
}

# free_ports N: TCP ports nobody listens on. Below the range that outgoing
# connections use, or one of those could take a port while its server restarts.
free_ports() {
  python3 - "$1" <<'EOF'
import random, socket, sys
held = []
while len(held) < int(sys.argv[1]):
    s = socket.socket()
    try:
        s.bind(("", random.randrange(20000, 29999)))
        held.append(s)
    except OSError:
        s.close()
print(*[s.getsockname()[1] for s in held])
EOF
}

# The address of this host that Pods on any bridge can reach.
host_address() {
  local address
  address=$(ip -4 route get 192.0.2.1 2>/dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p')
  [ -n "$address" ] || address=$(ip -4 -o addr show scope global | awk '{sub("/.*", "", $4); print $4; exit}')
  [ -n "$address" ] || fail "this host has no IPv4 address besides loopback" "bring a network interface up"
  echo "$address"
}

# unmount_below DIR...: everything mounted there, the last first.
unmount_below() {
  local dir target
  for dir in "$@"; do
    findmnt -rno TARGET | awk -v dir="$dir/" 'index($0, dir) == 1' | sort -r | while read -r target; do umount -l "$target"; done
  done
}

# The network namespace that what is started belongs to; empty is this one. Where it is
# another, hack/lib/second.sh has made it.
NETNS=''

# in_netns CMD...: in $NETNS. Unlike `ip netns exec` it leaves /sys as it is, with the cgroups.
in_netns() { ${NETNS:+nsenter --net="/run/netns/$NETNS" --} "$@"; }

# --- background processes, by id ------------------------------------------
# DIR/NAME.pid holds "pid start-time boot-id": a pid alone may by now belong to
# somebody else, and that one must never be killed.

proc_identity() { # PID
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  # The command name may hold spaces; what follows its ")" does not.
  # shellcheck disable=SC2086
  set -- "$1" ${stat##*) }
  # A zombie has ended, whoever forgot to wait for it.
  [ "$2" != Z ] || return 1
  echo "$1 ${21} $(cat /proc/sys/kernel/random/boot_id)"
}

proc_alive() { # DIR NAME
  local recorded
  recorded=$(cat "$1/$2.pid" 2>/dev/null) || return 1
  [ -n "$recorded" ] && [ "$(proc_identity "${recorded%% *}")" = "$recorded" ]
}

# proc_start DIR NAME CMD...: start CMD detached in $NETNS, log in DIR/NAME.log.
proc_start() {
  local dir=$1 name=$2
  shift 2
  mkdir -p "$dir"
  setsid ${NETNS:+nsenter --net="/run/netns/$NETNS" --} "$@" >>"$dir/$name.log" 2>&1 </dev/null 9>&- &
  local pid=$!
  disown "$pid" 2>/dev/null || true
  proc_identity "$pid" >"$dir/$name.pid" || true
}

# proc_stop DIR NAME [SECONDS]: TERM, then KILL after SECONDS (10).
proc_stop() {
  local dir=$1 name=$2 limit=${3:-10} pid
  if proc_alive "$dir" "$name"; then
    pid=$(cut -d' ' -f1 "$dir/$name.pid")
    kill -TERM "$pid" 2>/dev/null || true
    if ! wait_for "$limit" "$name (pid $pid) to end" proc_gone "$dir" "$name" 2>/dev/null; then
      say "$name did not end within $limit s of SIGTERM: killing pid $pid"
      proc_kill "$dir" "$name"
    fi
  fi
  rm -f "$dir/$name.pid"
}

# proc_kill DIR NAME: at once, as a crash would.
proc_kill() {
  local pid
  if proc_alive "$1" "$2"; then
    pid=$(cut -d' ' -f1 "$1/$2.pid")
    kill -KILL "$pid" 2>/dev/null || true
    wait_for 10 "$2 (pid $pid) to end" proc_gone "$1" "$2" || true
  fi
  rm -f "$1/$2.pid"
}

proc_gone() { ! proc_alive "$@"; }

ready_or_gone() { # DIR NAME CMD...
  "${@:3}" || proc_gone "$1" "$2"
}

# proc_ready DIR NAME SECONDS CMD...: wait until CMD succeeds; not when the
# process has ended. Why it does not become ready is read in the end of its log.
proc_ready() {
  local dir=$1 name=$2 limit=$3
  shift 3
  if wait_for "$limit" "$name to be ready" ready_or_gone "$dir" "$name" "$@"; then
    proc_gone "$dir" "$name" || return 0
    say "error: $name ended while starting"
  fi
  show_tail "$dir/$name.log" 30
  return 1
}

# shellcheck source=hack/lib/docker.sh
. "$HACK_DIR/lib/docker.sh"
