"""The outcome of tests/cri/promises against several runtimes, as a table.

cri_compare.py DIR OUT NAME...: DIR/NAME is what the tests printed against NAME. Ends with 1 if lambdalet does
not keep a promise.
"""

import re
import sys

TITLES = {"docker": "lambdalet, Docker", "microvm": "lambdalet, microVMs", "containerd": "containerd 2.2"}
SECTIONS = ("sandboxes", "containers", "logs", "streams", "events", "images", "runtime")


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
                else:
                    notes.append(f"{len(notes) + 1}. {TITLES[name]}: {found[promise]}")
                    cells.append(f"differs ({len(notes)})")
            lines.append(f"| {promise.split('::')[1].replace('_', ' ')} | " + " | ".join(cells) + " |")
    kept = [f"{TITLES[name]} {sum(said is None for said in found.values())} of {len(found)}" for name, found in outcomes.items()]
    lines += ["", "Kept: " + ", ".join(kept) + ".", ""]
    if notes:
        lines += ["## What was said instead", "", *notes, ""]
    open(out, "w").write("\n".join(lines))
    ours = [name for name in names if name != "containerd" and any(outcomes[name].values())]
    if ours:
        sys.exit("not all promises are kept by: " + ", ".join(TITLES[name] for name in ours))


main()
