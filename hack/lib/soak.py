"""The load of hack/soak, and what is looked at meanwhile and afterwards. Exit code 1 if an answer is wrong."""

import argparse
import collections
import itertools
import json
import os
import random
import ssl
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

IMAGE = "busybox:1.36"
NAMESPACE = "soak"
# Seconds between two looks at memory, restarts of the API server, and changes of what is updated.
LOOK, API_RESTARTS, UPDATES = 5, 60, 20
# Seconds that all has to become as it should be, once nothing is disturbed any more.
SETTLE = 600
# How much more memory the node may have in the last sixth of the time than in the second.
GROWTH = 1.10


def say(text):
    print(f"[soak {time.monotonic() - BEGUN:6.0f}s] {text}", flush=True)


BEGUN = time.monotonic()


class Api:
    """The API server, as the cluster's administrator. It is restarted all the time, so whatever cannot reach it is
    tried again."""

    def __init__(self, cluster):
        env = dict(line.split("=", 1) for line in Path(cluster, "env").read_text().splitlines() if "=" in line)
        self.url = f"https://127.0.0.1:{env['APISERVER_PORT']}"
        self.tls = ssl.create_default_context(cafile=f"{cluster}/ca.crt")
        self.tls.load_cert_chain(f"{cluster}/pki/admin.crt", f"{cluster}/pki/admin.key")
        # Whatever the environment says: it is on this host.
        handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.tls))
        self.opener = urllib.request.build_opener(*handlers)

    def call(self, method, path, body=None, kind="application/json"):
        data = None if body is None else json.dumps(body).encode()
        for last in (*[False] * 60, True):
            request = urllib.request.Request(self.url + path, data, {"Content-Type": kind}, method=method)
            try:
                with self.opener.open(request, timeout=30) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code in (404, 409) and method in ("DELETE", "POST"):
                    return None  # Done by the try before, whose answer was lost.
                if last or error.code not in (403, 429, 500, 503):
                    raise RuntimeError(f"{method} {path}: {error.code} {error.read().decode()[:300]}") from error
            except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, json.JSONDecodeError):
                if last:
                    raise
            time.sleep(1)

    def create(self, path, body):
        return self.call("POST", path, body)

    def patch(self, path, body):
        return self.call("PATCH", path, body, "application/merge-patch+json")

    def pods(self):
        return self.call("GET", f"/api/v1/namespaces/{NAMESPACE}/pods")["items"]


PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
DEPLOYMENTS = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
REQUESTS = {"requests": {"cpu": "1m", "memory": "4Mi"}}
SERVES = "echo up >/tmp/index.html; trap 'exit 0' TERM; httpd -p 8080 -h /tmp; while :; do sleep 3600 & wait $!; done"
CRASHES = "sleep $((1 + $(od -An -N1 -tu1 /dev/urandom) % 5)); exit 1"


def spec(node, script, **more):
    container = {"name": "c", "image": IMAGE, "command": ["sh", "-c", script], "resources": REQUESTS}
    return {
        "nodeSelector": {"kubernetes.io/hostname": node},
        "tolerations": [{"operator": "Exists"}],
        "terminationGracePeriodSeconds": 2,
        "containers": [container],
        **more,
    }


def deployment(name, replicas, pod):
    labels = {"app": name}
    return {
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "50%"}},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def serving(node):
    """Serves, is probed, and has a volume that changes."""
    pod = spec(node, SERVES, volumes=[{"name": "v", "configMap": {"name": "changing"}}])
    pod["containers"][0] |= {
        "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        "readinessProbe": {"httpGet": {"path": "/index.html", "port": 8080}, "periodSeconds": 5, "timeoutSeconds": 5},
    }
    return pod


class Load:
    def __init__(self, api, args):
        self.api, self.node, self.owner = api, args.node, args.owner
        share = args.pods // 11
        self.crashing, self.updated, self.brief = share, share, 3 * share
        self.steady = args.pods - self.crashing - self.updated - self.brief
        self.names, self.counts = itertools.count(), collections.Counter()

    def begin(self):
        self.api.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        self.api.create(MAPS, {"metadata": {"name": "changing"}, "data": {"n": "0"}})
        # Made by a controller, a moment after the namespace.
        while not self.api.call("GET", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts")["items"]:
            time.sleep(0.2)
        self.api.create(DEPLOYMENTS, deployment("steady", self.steady, serving(self.node)))
        self.api.create(DEPLOYMENTS, deployment("updated", self.updated, serving(self.node)))
        self.api.create(DEPLOYMENTS, deployment("crashing", self.crashing, spec(self.node, CRASHES)))

    def churn(self):
        """As many brief Pods as there are to be: those that have ended go, and some that have not."""
        alive = []
        for pod in self.api.pods():
            if not pod["metadata"]["name"].startswith("brief-"):
                continue
            alive.append(pod)
            if pod["metadata"].get("deletionTimestamp"):
                continue
            ended = pod["status"].get("phase") in ("Succeeded", "Failed")
            if ended or random.random() < 0.02:
                self.counts["ended" if ended else "deleted while they ran"] += 1
                self.api.call("DELETE", f"{PODS}/{pod['metadata']['name']}")
        for _ in range(self.brief - len(alive)):
            script = f"sleep {random.uniform(0, 20):.1f}; exit {random.choice([0, 0, 1])}"
            body = {"metadata": {"name": f"brief-{next(self.names)}"}, "spec": spec(self.node, script, restartPolicy="Never")}
            self.api.create(PODS, body)
            self.counts["created"] += 1

    def update(self, turn):
        self.counts["updates"] += 1
        self.api.patch(f"{MAPS}/changing", {"data": {"n": str(turn)}})
        if turn % 3 == 0:
            template = {"metadata": {"annotations": {"turn": str(turn)}}}
            self.api.patch(f"{DEPLOYMENTS}/updated", {"spec": {"template": template}})


def containers(owner):
    """State, Pod and name of each of the node's containers, or none while Docker is away."""
    labels = ("pod-uid", "kind", "container")
    form = "\t".join(["{{.State}}", *('{{.Label "lambdalet.dev/%s"}}' % label for label in labels)])
    told = subprocess.run(
        ["docker", "ps", "-a", "--filter", f"label=lambdalet.dev/owner={owner}", "--format", form], capture_output=True, text=True
    )
    return [line.split("\t") for line in told.stdout.splitlines()] if told.returncode == 0 else []


def doubled(owner):
    running = collections.Counter(tuple(rest) for state, *rest in containers(owner) if state == "running")
    return [f"{count} of {name or kind} run in Pod {uid}" for (uid, kind, name), count in running.items() if count > 1]


def links():
    return {name for name in os.listdir("/sys/class/net") if name.startswith(("lv", "lt"))}


def remains(root, owner, others):
    """What Pods leave on a host, if they leave anything; `others` are links that were there before."""
    found = [f"container {' '.join(each)}" for each in containers(owner)]
    mounts = Path("/proc/self/mountinfo").read_text().split("\n")
    found += [f"mount {line.split()[4]}" for line in mounts if line and line.split()[4].startswith(f"{root}/pods/")]
    found += [f"link {name}" for name in links() - others]
    for folder, _, _ in os.walk("/sys/fs/cgroup"):
        if "/pod" in folder.partition(f"/lambdalet-{owner}")[2]:
            found.append(f"cgroup {folder}")
    found += [f"directory {path}" for path in Path(root, "pods").glob("*")]
    return found


def resident(pid):
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1])


def open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settled(load):
    """Why not yet, or nothing."""
    pods = load.api.pods()
    by_uid = {pod["metadata"]["uid"]: pod for pod in pods}
    for name, replicas in (("steady", load.steady), ("updated", load.updated)):
        status = load.api.call("GET", f"{DEPLOYMENTS}/{name}")["status"]
        if (status.get("availableReplicas"), status.get("updatedReplicas")) != (replicas, replicas):
            return f"{status.get('availableReplicas', 0)} of {replicas} replicas of {name} are available"
    for pod in pods:
        if pod["metadata"]["name"].startswith("brief-") and pod["status"]["phase"] not in ("Succeeded", "Failed"):
            return f"{pod['metadata']['name']} is {pod['status']['phase']}"
    running = {(uid, name) for state, uid, _, name in containers(load.owner) if state == "running" and name}
    for uid, name in running:
        if uid not in by_uid:
            return f"container {name} of Pod {uid} runs, and there is no such Pod"
    for uid, pod in by_uid.items():
        app = pod["metadata"].get("labels", {}).get("app")
        if app in ("steady", "updated") and (uid, "c") not in running:
            return f"Pod {pod['metadata']['name']} is Ready without a container"
    return None


def wait_until_none(what, limit):
    """Waits until `what()` finds nothing; what it found last."""
    until = time.monotonic() + limit
    while (found := what()) and time.monotonic() < until:
        time.sleep(2)
    return found


def hook(*command):
    begun = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def main():
    parser = argparse.ArgumentParser()
    for name in ("hack", "cluster", "node", "root", "owner", "samples"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("pid", "minutes", "pods"):
        parser.add_argument(f"--{name}", required=True, type=int)
    args = parser.parse_args()
    load, wrong, samples = Load(Api(args.cluster), args), [], []
    others = links()
    load.begin()
    seconds = args.minutes * 60
    docker_restarts = [seconds / 3, 2 * seconds / 3]
    due = {"api": API_RESTARTS, "update": UPDATES}
    begun, before = time.monotonic(), cpu_seconds(args.pid)
    for turn in itertools.count():
        elapsed = time.monotonic() - begun
        if elapsed >= seconds:
            break
        load.churn()
        wrong += doubled(args.owner)
        samples.append((elapsed, resident(args.pid), open_files(args.pid)))
        if elapsed >= due["update"]:
            due["update"] += UPDATES
            load.update(load.counts["updates"])
        if elapsed >= due["api"]:
            due["api"] += API_RESTARTS
            load.counts["restarts of the API server"] += 1
            took = hook(f"{args.hack}/cluster", "--dir", args.cluster, "restart-apiserver")
            say(f"API server restarted ({took:.0f} s); {samples[-1][1] >> 10} MiB, {samples[-1][2]} files; {dict(load.counts)}")
        if docker_restarts and elapsed >= docker_restarts[0]:
            docker_restarts.pop(0)
            load.counts["restarts of Docker"] += 1
            say(f"Docker restarted ({hook(f'{args.hack}/soak', 'restart-docker'):.0f} s)")
        time.sleep(max(0, LOOK - (time.monotonic() - begun - elapsed)))
    used = cpu_seconds(args.pid) - before
    Path(args.samples).write_text("seconds,rss_kib,open_files\n" + "".join(f"{t:.0f},{m},{f}\n" for t, m, f in samples))

    say(f"{dict(load.counts)}; nothing is disturbed any more")
    if (late := wait_until_none(lambda: settled(load), SETTLE)):
        wrong.append(f"after {SETTLE} s: {late}")
    wrong += doubled(args.owner)
    load.api.call("DELETE", f"/api/v1/namespaces/{NAMESPACE}")
    if (left := wait_until_none(load.api.pods, SETTLE)):
        wrong.append(f"{len(left)} Pods are not gone after {SETTLE} s: {left[0]['metadata']['name']}")
    if (left := wait_until_none(lambda: remains(args.root, args.owner, others), 60)):
        wrong += [f"left behind: {each}" for each in left]

    sixth = max(1, len(samples) // 6)
    early, late = ([memory for _, memory, _ in part] for part in (samples[sixth : 2 * sixth], samples[-sixth:]))
    early, late, most = statistics.median(early) / 1024, statistics.median(late) / 1024, max(m for _, m, _ in samples) / 1024
    # Before that the load itself still grows.
    if args.minutes >= 12 and late > early * GROWTH:
        wrong.append(f"memory has grown: {early:.1f} MiB in the second sixth of the time, {late:.1f} MiB in the last")
    print("\n| | |\n|---|---|")
    print(f"| time, Pods at once | {args.minutes} min, {args.pods} |")
    for what, count in load.counts.items():
        print(f"| {what} | {count} |")
    print(f"| RSS: median of the second sixth, of the last, max | {early:.1f}, {late:.1f}, {most:.1f} MiB |")
    print(f"| open files: max, at the end | {max(f for _, _, f in samples)}, {open_files(args.pid)} |")
    print(f"| CPU of a core | {100 * used / seconds:.1f} % |")
    print(f"| wrong | {len(wrong)} |")
    for each in wrong[:50]:
        print(f"wrong: {each}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
