# shellcheck shell=bash
# Where the fakecloud program comes from. Sourced by hack/images, hack/fakecloud
# and hack/test.
#
# It is published as a crate only and takes an hour to compile, so a compressed
# binary is expected next to this repository, or named by the environment:
#   FAKECLOUD_BIN      a fakecloud binary
#   FAKECLOUD_ARCHIVE  the same, compressed with zstd

FAKECLOUD_VERSION=0.51.0

# fakecloud_binary: print the path of the program, unpacked once into the cache.
fakecloud_binary() {
  local target=$CACHE/bin/fakecloud-$FAKECLOUD_VERSION/fakecloud
  local archive=${FAKECLOUD_ARCHIVE:-$REPO_DIR/../shared/bin/fakecloud-$FAKECLOUD_VERSION-$(uname -m)-linux.zst}
  if [ -n "${FAKECLOUD_BIN:-}" ]; then
    [ -x "$FAKECLOUD_BIN" ] || fail "FAKECLOUD_BIN=$FAKECLOUD_BIN is not a program"
    realpath "$FAKECLOUD_BIN"
    return
  fi
  if [ ! -x "$target" ]; then
    [ -s "$archive" ] || fail "no fakecloud: $archive does not exist" \
      "set FAKECLOUD_ARCHIVE or FAKECLOUD_BIN, or: cargo install fakecloud --version $FAKECLOUD_VERSION --locked (an hour)"
    need_packages zstd
    mkdir -p "$(dirname "$target")"
    say "unpacking fakecloud $FAKECLOUD_VERSION"
    zstd -q -d -f -o "$target.tmp.$$" "$archive" || fail "could not unpack $archive" "is the file complete?"
    chmod +x "$target.tmp.$$"
    mv "$target.tmp.$$" "$target"
  fi
  echo "$target"
}
