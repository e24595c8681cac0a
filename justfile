# Short names for what the scripts do; CI calls the same scripts.

# List the recipes.
default:
    @just --list

# Everything that must be green before a change lands.
check:
    bash .ci/run

# Formatting, lints, documentation and the tests that need no cluster.
quick: fmt-check clippy doc unit

# Format the code.
fmt:
    cargo fmt --all

# Complain about formatting.
fmt-check:
    cargo fmt --all --check

# Lints, as CI has them.
clippy:
    cargo clippy --workspace --all-targets --locked -- -D warnings

# The documentation, its links checked; the tour is lambdalet/index.html.
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items

# Tests that need no cluster; those that make network namespaces and mounts need root.
unit *FILTER:
    cargo test --locked -- {{FILTER}}

# The rules of the house: import direction, sizes, reachability; and the manifests.
house:
    cargo test --locked --test layout --test manifests

# Every test there is, on a real cluster (root).
test *ARGS:
    ./hack/test {{ARGS}}

# A cluster, a node and a Pod to look at (root); `just demo down` removes it.
demo *ARGS:
    ./hack/demo {{ARGS}}

# Licences, banned crates, sources, known vulnerabilities.
audit:
    cargo deny --locked check

# The program as it is shipped.
dist:
    cargo build --locked --profile dist
