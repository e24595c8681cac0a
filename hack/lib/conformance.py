"""What hack/conformance asks of the reports that ginkgo writes, and of the files in hack/conformance.d.

  conformance.py summary REPORT FOLDER     counts, and each failure's first line; writes passed, failed, skipped and
                                           times into FOLDER; exit code 1 if a spec failed or none ran
  conformance.py check SKIPPED PEER        whether the reason file may be believed
  conformance.py skip SKIPPED              one regular expression for the specs of the reason file
  conformance.py any FILE                  one regular expression for the lines of a file
  conformance.py but FILE                  one for its lines that begin with "!"
"""

import json
import re
import sys
from pathlib import Path

# Specs that the peer does not pass either and that may be left out.
MOST_SKIPPED = 5


def name_of(spec):
    """A spec's full name, as --focus and --skip see it."""
    return " ".join(text for text in [*(spec.get("ContainerHierarchyTexts") or []), spec.get("LeafNodeText")] if text)


def specs_of(report):
    """Every spec that was begun, and what of a suite's own steps went wrong."""
    for suite in json.loads(Path(report).read_text()):
        for spec in suite.get("SpecReports") or []:
            begun = spec.get("NumAttempts", 0) > 0
            if spec.get("LeafNodeType") == "It":
                if begun:
                    yield spec
            elif spec["State"] not in ("passed", "skipped"):
                yield {**spec, "LeafNodeText": f"({spec['LeafNodeType']})"}
        for reason in suite.get("SpecialSuiteFailureReasons") or []:
            if reason != "Detected Programmatic Focus":
                yield {"LeafNodeText": "(suite)", "State": "failed", "RunTime": 0, "Failure": {"Message": reason}}


def first_line(spec):
    failure = spec.get("Failure") or {}
    lines = [line.strip() for line in failure.get("Message", "").splitlines() if line.strip()]
    place = failure.get("Location") or {}
    where = f" ({Path(place['FileName']).name}:{place.get('LineNumber', 0)})" if place.get("FileName") else ""
    return (lines[0][:300] if lines else "no message") + where


def summary(report, folder):
    by_state = {"passed": [], "failed": [], "skipped": []}
    for spec in specs_of(report):
        state = spec["State"] if spec["State"] in ("passed", "skipped") else "failed"
        by_state[state].append((name_of(spec), spec))
    failed = {name for name, spec in by_state["failed"] if not name.startswith("(")}
    if failed:
        # What says no more than that a spec has failed.
        by_state["failed"] = [(name, spec) for name, spec in by_state["failed"] if name != "(suite)"]
    times = []
    for state, found in by_state.items():
        found.sort(key=lambda entry: entry[0])
        Path(folder, state).write_text("".join(f"{name}\n" for name, _ in found))
        times += [(spec.get("RunTime", 0) / 1e9, name) for name, spec in found]
    Path(folder, "times").write_text("".join(f"{took:7.1f} {name}\n" for took, name in sorted(times, reverse=True)))
    for state in ("skipped", "failed"):
        for name, spec in by_state[state]:
            print(f"{state}: {name}\n    {first_line(spec)}")
    counts = {state: len(found) for state, found in by_state.items()}
    print(f"{sum(counts.values())} specs: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts["failed"] or not counts["passed"] else 0


def reasons(path):
    """Spec to reason: a line with the name, then its reason, indented."""
    found, name = {}, None
    for line in Path(path).read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if not line[0].isspace():
            name = line.strip()
            found[name] = ""
        elif name is None:
            sys.exit(f"{path}: a reason before the first spec: {line.strip()!r}")
        else:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def lines(path):
    return [line for line in Path(path).read_text().splitlines() if line.strip() and not line.startswith("#")]


def check(skipped, peer):
    listed, passed = reasons(skipped), set(lines(peer))
    wrong = [f"{name}: no reason is given" for name, reason in listed.items() if not reason]
    wrong += [f"{name}: the peer passes it, so it must run" for name in listed if name in passed]
    if len(listed) > MOST_SKIPPED:
        wrong.append(f"{len(listed)} specs are left out, and at most {MOST_SKIPPED} may be")
    if not passed:
        wrong.append(f"{peer} names no spec that the peer passes")
    for line in wrong:
        print(f"{skipped}: {line}", file=sys.stderr)
    return 1 if wrong else 0


def main(command, *args):
    if command == "summary":
        return summary(*args)
    if command == "check":
        return check(*args)
    if command == "skip":
        # ginkgo matches against the suite's description and the name.
        print("|".join(f" {re.escape(name)}$" for name in reasons(*args)))
    elif command == "any":
        print("|".join(line for line in lines(*args) if not line.startswith("!")))
    elif command == "but":
        print("|".join(line[1:].strip() for line in lines(*args) if line.startswith("!")))
    else:
        sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 2 else __doc__)
