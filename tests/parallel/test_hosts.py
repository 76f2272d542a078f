"""Network namespaces as hosts: a rank that is lost, a link that is cut or too slow."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.runs import ranks_of, saved, start, until, write_recipe

pytestmark = pytest.mark.slow
# names of this process's own: other tests make such hosts at the same time
OWN = os.getpid()
HOSTS = {f"moestro-a-{OWN}": ("10.77.0.1", f"veth-a{OWN}"), f"moestro-b-{OWN}": ("10.77.0.2", f"veth-b{OWN}")}
FIRST, SECOND = HOSTS


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def inside(host: str, *words: str) -> None:
    ip("netns", "exec", host, *words)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces and a cable between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2 (the command ip)")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", HOSTS[FIRST][1], "type", "veth", "peer", "name", HOSTS[SECOND][1])
    except subprocess.CalledProcessError as error:
        take_down()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    for host, (address, device) in HOSTS.items():
        ip("link", "set", device, "netns", host)
        ip("-n", host, "addr", "add", f"{address}/24", "dev", device)
        for name in ("lo", device):
            ip("-n", host, "link", "set", name, "up")
    yield
    take_down()


def take_down() -> None:
    for host in HOSTS:
        listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
        for process in listed:
            os.kill(int(process), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", host], capture_output=True)


def train_on(host: str, recipe: Path, run: Path, restarts: int, nodes: str = "2") -> subprocess.Popen:
    """An agent with one rank on a host; its output goes to a file of the host's name."""
    address, device = HOSTS[host]
    meeting = f"is_host={int(host == FIRST)},join_timeout=120,last_call_timeout=5,read_timeout=15"
    torchrun = ["-m", "moestro.parallel.agent", "--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    place = ["--rdzv-endpoint", f"{HOSTS[FIRST][0]}:29400", "--rdzv-id", "run", "--rdzv-conf", meeting]
    what = ["--local-addr", address, "--max-restarts", str(restarts), "-m", "moestro", "train", str(recipe)]
    words = ["ip", "netns", "exec", host, sys.executable, *torchrun, *place, *what, "--out", str(run)]
    return start([*words, "--device", "cpu"], recipe.parent / host, GLOO_SOCKET_IFNAME=device)


def both(recipe: Path, run: Path, restarts: int, nodes: str = "2") -> list[subprocess.Popen]:
    """Training on both hosts, once its first checkpoint is there."""
    trainings = [train_on(host, recipe, run, restarts, nodes) for host in HOSTS]
    until(lambda: saved(run), 180, "the first checkpoint")
    return trainings


def said(recipe: Path) -> str:
    return "".join((recipe.parent / host).read_text() for host in HOSTS)


def test_a_rank_lost_on_another_host_is_replaced(hosts: None, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, steps=60, timeout=20), tmp_path / "run"
    trainings = both(recipe, run, restarts=5)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    assert [training.wait(400) for training in trainings] == [0, 0], said(recipe)
    assert (run / "done.json").exists() and "continuing from step-" in said(recipe)


def test_a_host_that_is_lost_is_done_without(hosts: None, tmp_path: Path) -> None:
    """torchrun --nnodes 1:2: the other host goes on alone, from the last checkpoint."""
    recipe, run = write_recipe(tmp_path, steps=60, timeout=20), tmp_path / "run"
    first, second = both(recipe, run, restarts=5, nodes="1:2")
    second.kill()
    listed = subprocess.run(["ip", "netns", "pids", SECOND], capture_output=True, text=True).stdout.split()
    for process in listed:
        os.kill(int(process), signal.SIGKILL)
    assert first.wait(400) == 0, said(recipe)
    assert '"ranks": 1' in (run / "environment.json").read_text()


def test_a_cut_link_is_a_clear_error(hosts: None, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, steps=20000, timeout=10), tmp_path / "run"
    trainings = both(recipe, run, restarts=0)
    ip("-n", FIRST, "link", "set", HOSTS[FIRST][1], "down")
    assert all(training.wait(120) for training in trainings), said(recipe)
    assert "lost another rank" in said(recipe) and "parallel.timeout_s=10" in said(recipe)
    assert not ranks_of(run)


def test_a_link_that_is_too_slow_is_a_clear_error(hosts: None, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, steps=20000, timeout=10), tmp_path / "run"
    trainings = both(recipe, run, restarts=0)
    slow = ["root", "tbf", "rate", "20kbit", "burst", "2kbit", "latency", "400ms"]
    try:
        inside(FIRST, "tc", "qdisc", "add", "dev", HOSTS[FIRST][1], *slow)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"tc cannot slow a link here: {error.stderr.decode().strip()}")
    assert all(training.wait(120) for training in trainings), said(recipe)
    assert "lost another rank" in said(recipe)
