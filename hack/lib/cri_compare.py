"""The outcome of tests/cri/promises against several runtimes, as a table.

cri_compare.py DIR OUT NAME...: DIR/NAME is what the tests printed against NAME. Ends with 1 if lambdalet does
not keep a promise, unless it says that it cannot (Unimplemented) and REFUSED says why; or if it keeps one of those.
"""

import re
import sys

TITLES = {"docker": "lambdalet, Docker", "microvm": "lambdalet, microVMs", "containerd": "containerd 2.2"}
COPIES = (
    "a guest gets copies of the host's files, of those directories that --microvm-host-paths names, and writes to none of them"
)
# What cannot be had of a runtime, and why.
REFUSED = {
    "microvm": {
        "sandboxes::a_sandbox_on_the_hosts_network_has_no_address": "a microVM has a kernel of its own, and so a network",
        "namespaces::a_pod_may_have_the_hosts_ipc_and_processes": "a microVM has a kernel of its own",
        "security::a_filter_of_the_host_holds_system_calls": "a microVM has a kernel of its own",
        "containers::a_directory_of_the_host_is_mounted_and_made_if_it_is_not_there": COPIES,
        "mounts::a_file_of_the_host_is_mounted_as_a_file": COPIES,
        "mounts::a_read_only_mount_is_read_and_not_written_to": COPIES,
        "mounts::what_a_container_mounts_is_seen_by_the_host_where_that_is_wanted": COPIES,
        "mounts::what_the_host_mounts_later_is_seen_where_that_is_wanted": COPIES,
    }
}
SECTIONS = (
    "sandboxes", "containers", "processes", "security", "namespaces", "mounts", "logs", "streams", "events", "images", "runtime",
)


def outcome(path):
    """{promise: None if it was kept, else what the test said}"""
    text = open(path, errors="replace").read()
    found = {}
    for name, result in re.findall(r"^test promises::(\S+) \.\.\. (ok|FAILED)", text, re.M):
        found[name] = None
        if result == "FAILED":
            block = re.search(rf"^---- promises::{re.escape(name)} stdout ----\n(.*?)(?=^---- |^failures:|\Z)", text, re.M | re.S)
            found[name] = said(block.group(1) if block else "")
    return found


def said(block):
    """The first panic's message in one line, without what differs from run to run."""
    message = re.search(r"panicked at [^\n]*\n(.*?)(?=\nnote: |\nthread |\Z)", block, re.S)
    line = " ".join((message.group(1) if message else block).split())
    status = re.search(r'code: "?(.*?)"?, message: "((?:[^"\\]|\\.)*)"', line)
    if status:
        line = f"{status.group(1)}: {status.group(2)}"
    line = re.sub(r"[0-9a-f]{12,}", "<id>", line).replace("|", "\\|").replace('\\"', '"')
    return line if len(line) <= 160 else line[:157] + "..."


def is_refused(name, promise, text):
    return bool(text) and text.startswith("Unimplemented") and promise in REFUSED.get(name, {})


def main():
    folder, out, names = sys.argv[1], sys.argv[2], sys.argv[3:]
    outcomes = {name: outcome(f"{folder}/{name}") for name in names}
    every = sorted({promise for found in outcomes.values() for promise in found})
    lines = [
        "# CRI's promises, and who keeps them",
        "",
        "Written by `hack/cri-compare`, which asks each promise (a test of `tests/cri/promises`) of each runtime on one host.",
    ]
    notes = []
    for section in SECTIONS:
        promises = [promise for promise in every if promise.startswith(section + "::")]
        if not promises:
            continue
        lines += ["", f"## {section.capitalize()}", ""]
        lines += ["| promise | " + " | ".join(TITLES[name] for name in names) + " |", "|---|" + "---|" * len(names)]
        for promise in promises:
            cells = []
            for name in names:
                found = outcomes[name]
                if promise not in found:
                    cells.append("not asked")
                elif found[promise] is None:
                    cells.append("ok")
                elif is_refused(name, promise, found[promise]):
                    notes.append(f"{len(notes) + 1}. {TITLES[name]}: refused, for {REFUSED[name][promise]}.")
                    cells.append(f"refused ({len(notes)})")
                else:
                    notes.append(f"{len(notes) + 1}. {TITLES[name]}: {found[promise]}")
                    cells.append(f"differs ({len(notes)})")
            lines.append(f"| {promise.split('::')[1].replace('_', ' ')} | " + " | ".join(cells) + " |")
    kept = [f"{TITLES[name]} {sum(said is None for said in found.values())} of {len(found)}" for name, found in outcomes.items()]
    lines += ["", "Kept: " + ", ".join(kept) + ".", ""]
    if notes:
        lines += ["## What was said instead", "", *notes, ""]
    open(out, "w").write("\n".join(lines))
    wrong = []
    for name in names:
        found, refused = outcomes[name], REFUSED.get(name, {})
        if name != "containerd":
            broken = [promise for promise, text in found.items() if text is not None]
            wrong += [f"{TITLES[name]} does not keep {one}" for one in broken if not is_refused(name, one, found[one])]
        wrong += [f"{TITLES[name]} keeps {one}, which is said to be refused" for one in refused if found.get(one, "") is None]
    if wrong:
        sys.exit("\n".join(wrong))


main()
