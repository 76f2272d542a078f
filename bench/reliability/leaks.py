"""Memory over a thousand training steps and over a thousand requests to a server, of which some clients leave early.

    python -m bench.reliability.leaks [--json PATH]

Told is the slope of resident memory by least squares, after a first part in which caches fill; wanted are less than
KIB_A_STEP and KIB_A_REQUEST. Training evaluates and saves on the way; requests are streams, whole answers, refusals,
and connections that are closed after the first token or in the body.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np

from bench.harness import ROOT
from bench.reliability.figures import Figure, report
from bench.reliability.workspace import RECIPES, SMALL, Workspace, made_workspace

STEPS = REQUESTS = 1000
FIRST, EVERY = 300, 20
KIB_A_STEP = KIB_A_REQUEST = 8.0
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> float:
    """KiB of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1024


def slope(counts: list[int], sizes: list[float]) -> float:
    """KiB for each of what is counted, by least squares."""
    return float(np.polyfit(counts, sizes, 1)[0])


def training(work: Workspace) -> list[Figure]:
    """Watch a run by the lines of its metrics."""
    out, recipe = work.folder / "long", str(RECIPES / "hmoe.yaml")
    often = ["train.eval_every=100", "train.save_every=100"]
    words = ["train", recipe, *work.quick, *SMALL, *often, f"train.budget={{steps: {STEPS}}}", "--out", str(out)]
    counts, sizes = [], []
    with subprocess.Popen(
        [sys.executable, "-m", "moestro", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            done = (out / "metrics.jsonl").read_text().count('"lr"') if (out / "metrics.jsonl").exists() else 0
            if done >= FIRST and (not counts or done >= counts[-1] + EVERY):
                counts.append(done)
                sizes.append(resident(process.pid))
            time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"moestro {' '.join(words)} ended with {process.returncode}")
    found = slope(counts, sizes)
    return [
        Figure("training", "steps", STEPS, "steps"),
        Figure("training", "resident at the end", sizes[-1] / 1024, "MiB"),
        Figure("training", "growth a step", found, "KiB", f"below {KIB_A_STEP:g}", found < KIB_A_STEP),
    ]


def ask(url: str, number: int) -> None:
    """One request of the kind that comes by turns."""
    fields = {"model": "hmoe", "prompt": f"the fox {number % 7}"[:8], "max_tokens": 4, "seed": number}
    if number % 5 == 4:
        fields["unknown"] = 1
    body = json.dumps(fields | {"stream": number % 2 == 0}).encode()
    if number % 5 in (2, 3):
        _leave(url, body, number)
        return
    try:
        with urlopen(
            Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"}), timeout=60
        ) as answer:
            answer.read()
    except OSError:
        # a refusal is an answer, too
        if number % 5 != 4:
            raise


def _leave(url: str, body: bytes, number: int) -> None:
    """Close the connection in the body, or after the first bytes of the answer."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head + (body[:10] if number % 5 == 3 else body))
        if number % 5 == 2:
            connection.recv(20)


def address(process: subprocess.Popen[str]) -> str:
    """Where a server that was just started listens.

    Raises: RuntimeError where it did not start.
    """
    found = re.search(r"(http://\S+)/v1", process.stdout.readline() if process.stdout else "")
    if found is None:
        raise RuntimeError("the server did not start")
    return found[1]


def serving(work: Workspace) -> list[Figure]:
    """Watch a server between requests."""
    command = [sys.executable, "-m", "moestro", "serve", str(work.folder / "hmoe"), "--port", "0", "--name", "hmoe"]
    counts, sizes = [], []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        url = address(process)
        for number in range(REQUESTS):
            ask(url, number)
            if number >= FIRST and number % EVERY == 0:
                counts.append(number)
                sizes.append(resident(process.pid))
        with urlopen(f"{url}/metrics") as answer:
            gauges = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
        process.send_signal(signal.SIGTERM)
    growth, waiting = (
        slope(counts, sizes),
        int(gauges["moestro_requests_active"]) + int(gauges["moestro_requests_waiting"]),
    )
    return [
        Figure("serving", "requests, two of five left by their clients", REQUESTS, "requests"),
        Figure("serving", "resident at the end", sizes[-1] / 1024, "MiB"),
        Figure("serving", "growth a request", growth, "KiB", f"below {KIB_A_REQUEST:g}", growth < KIB_A_REQUEST),
        Figure("serving", "requests that are still held", waiting, "requests", "0", waiting == 0),
    ]


def main() -> None:
    """Watch both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"MOESTRO_CACHE": f"{name}/cache", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
        work = made_workspace(Path(name) / "work")
        report("bench/reliability/leaks.py", [*training(work), *serving(work)], options)


if __name__ == "__main__":
    main()
