"""A server process as others meet it: who is answered, how much it takes, what it gives away."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.conftest import ROOT
from tests.stock_models import CONTEXT, stock_folder

KEY = "correct-horse-battery-staple"
ASKED: dict[str, Any] = {"model": "tiny", "prompt": "ab", "max_tokens": 2}


class Process(NamedTuple):
    """`moestro serve` in a process of its own."""

    url: str
    process: subprocess.Popen
    log: Path

    def post(self, key: str | None = KEY, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        """A request for a text."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.post(self.url + path, json=ASKED | fields, headers=headers, timeout=60)


@contextmanager
def process(folder: Path, log: Path, *words: str, **environment: str) -> Iterator[Process]:
    """Serve a folder until the block ends."""
    command = [sys.executable, "-m", "moestro", "serve", str(folder), "--port", "0", "--name", "tiny", *words]
    with log.open("w") as said:
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT, env={**os.environ, **environment}
        )
        try:
            line = (running.stdout or [""]).readline()  # type: ignore[union-attr]
            found = re.search(r"on (http://\S+)/v1", line)
            assert found, line + log.read_text()
            yield Process(found[1], running, log)
        finally:
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model's folder."""
    return stock_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """With a key from a file and bodies of 4,000 bytes."""
    log = tmp_path_factory.mktemp("log")
    (log / "key").write_text(KEY + "\n")
    words = ("--api-key-file", str(log / "key"), "--max-body", "4000", "--active", "1", "--waiting", "1")
    with process(folder, log / "stderr", *words) as running:
        yield running


def test_only_who_has_the_key_is_answered(served: Process) -> None:
    assert served.post().status_code == 200
    for wrong in (None, KEY[:-1], KEY + "x", KEY.upper(), KEY[::-1]):
        for path in ("/v1/completions", "/v1/chat/completions"):
            header = {} if wrong is None else {"Authorization": f"Bearer {wrong}".encode()}
            answer = httpx.post(served.url + path, json=ASKED, headers=header)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.text
    for scheme in ("Basic", "bearerx", ""):
        answer = httpx.get(served.url + "/v1/models", headers={"Authorization": f"{scheme} {KEY}".strip()})
        assert answer.status_code == 401
    assert httpx.get(served.url + "/v1/models", headers={"Authorization": f"bearer {KEY}"}).status_code == 200
    assert (
        httpx.get(served.url + "/metrics").status_code == 401 and httpx.get(served.url + "/health").status_code == 200
    )


def test_a_wrong_key_is_refused_before_its_body_is_read(served: Process) -> None:
    assert httpx.post(served.url + "/v1/completions", content=b"{" * 3000).status_code == 401


def test_the_key_is_nowhere_to_be_read(served: Process) -> None:
    served.post()
    served.post(KEY + "x")
    assert KEY not in served.log.read_text()
    assert KEY not in Path(f"/proc/{served.process.pid}/cmdline").read_text()
    assert KEY not in httpx.get(served.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"}).text


def test_bodies_and_tokens_have_a_limit(served: Process) -> None:
    assert served.post(prompt="x" * 5000).status_code == 413
    assert served.post(max_tokens=CONTEXT * 2).json()["error"]["code"] == "context_length_exceeded"
    assert served.post(prompt=["a"] * 5).status_code == 400
    assert served.post(stop=["x"] * 17).status_code == 400
    deep = b'{"model": ' + b"[" * 1900 + b"]" * 1900 + b"}"
    answer = httpx.post(served.url + "/v1/completions", content=deep, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 400


def test_a_body_without_a_length_or_an_end_is_cut_off(served: Process) -> None:
    def endless() -> Iterator[bytes]:
        yield from (b"x" * 1000 for _ in range(100_000))

    headers = {"Authorization": f"Bearer {KEY}"}
    try:
        answer = httpx.post(served.url + "/v1/completions", content=endless(), headers=headers, timeout=30)
        assert answer.status_code == 413
    except httpx.WriteError:
        # it was cut off while it was still being sent
        pass
    assert served.post().status_code == 200


def test_headers_and_names_of_files_are_no_way_in(served: Process) -> None:
    for path in (
        "/../../etc/passwd",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/%00",
        "/docs",
        "/openapi.json",
        "/static/x",
    ):
        answer = httpx.get(served.url + path, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 404 and "root:" not in answer.text
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=20)
    connection.request("GET", "/health", headers={f"X-{i}": "y" * 1000 for i in range(300)})
    assert connection.getresponse().status in (400, 431)


def test_answers_say_little_of_the_server(served: Process) -> None:
    answer = served.post()
    given = {name.lower() for name in answer.headers}
    assert not given & {"server", "x-powered-by", "access-control-allow-origin", "set-cookie"}
    failed = served.post(prompt={"x": 1})
    assert failed.status_code == 400 and "Traceback" not in failed.text and str(ROOT) not in failed.text


@pytest.mark.parametrize("header", ["Host", "Origin"])
def test_pages_of_other_sites_are_refused(served: Process, header: str) -> None:
    allowed = {"Authorization": f"Bearer {KEY}"}
    port = served.url.rpartition(":")[2]
    others = ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "127.0.0.1@evil.example")
    for other in (*others, "null", "["):
        value = other if header == "Host" or other == "null" else f"http://{other}"
        answer = httpx.get(served.url + "/v1/models", headers={**allowed, header: value})
        assert answer.status_code == 403 and "is not this machine" in answer.json()["error"]["message"]
    for own in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        value = own if header == "Host" else f"http://{own}"
        assert httpx.get(served.url + "/v1/models", headers={**allowed, header: value}).status_code == 200
    asked = httpx.options(
        served.url + "/v1/completions", headers={"Origin": served.url, "Access-Control-Request-Method": "POST"}
    )
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.slow
def test_a_server_that_others_reach_says_so_where_nobody_is_asked_for_a_key(folder: Path, tmp_path: Path) -> None:
    with process(folder, tmp_path / "log", "--host", "0.0.0.0", MOESTRO_API_KEY=KEY) as running:
        url = running.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(url + "/v1/models").status_code == 401
        # behind a name of its own
        answer = httpx.get(url + "/v1/models", headers={"Host": "models.example", "Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200 and "can be reached" not in running.log.read_text()
    with process(folder, tmp_path / "log", "--host", "0.0.0.0") as running:
        assert "can be reached from elsewhere and no API key is asked for" in running.log.read_text()


def test_more_than_there_are_places_for_are_told_to_come_back(served: Process) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(served.post, max_tokens=60, prompt="a" * 20, temperature=1.5, seed=i) for i in range(12)]
        answers = [each.result() for each in asked]
    codes = {answer.status_code for answer in answers}
    assert codes <= {200, 429} and 200 in codes
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
    begun = time.monotonic()
    assert served.post().status_code == 200 and time.monotonic() - begun < 30
    assert json.loads(httpx.get(served.url + "/health").text) == {"status": "ok"}
