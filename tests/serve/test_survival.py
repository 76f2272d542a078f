"""Clients that leave, crowds, models that fail, and the end of the server: nothing is lost, nobody else is hurt."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from moestro.generation import Options, Sampling, TextModel
from tests.serve.conftest import Served, serving, until

LONG: dict[str, Any] = {"model": "tiny", "prompt": "ab", "max_tokens": 500, "temperature": 1.0, "seed": 11}


@pytest.fixture
def endless(text_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> TextModel:
    """No text ends before its last token, and a token takes 4 ms, so that a long answer takes two seconds."""
    forward = text_model.model.forward

    def slower(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.004)
        return forward(*args, **kwargs)

    monkeypatch.setattr(text_model, "ends", frozenset())
    monkeypatch.setattr(text_model.model, "forward", slower)
    return text_model


def test_clients_that_leave_end_their_generation(served: Served, endless: TextModel) -> None:
    before = served.server.config.app.state.service.metrics.disconnects  # type: ignore[union-attr]
    client = served.client()
    with client.completions.create(**LONG, stream=True) as stream:
        next(iter(stream))
        assert served.worker.n_active == 1
    assert served.idle()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**LONG)
    assert served.idle()
    metrics = served.server.config.app.state.service.metrics  # type: ignore[union-attr]
    assert until(lambda: metrics.disconnects == before + 2)
    assert client.completions.create(**LONG | {"max_tokens": 3}).usage.completion_tokens == 3  # type: ignore[union-attr]


def test_a_client_that_leaves_in_its_body_is_forgotten(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    import socket

    host, port = served.url.removeprefix("http://").split(":")
    for sent in (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b"GARBAGE\r\n\r\n", b""):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(sent)
    assert served.client().models.list().data and served.idle()
    assert "Traceback" not in caplog.text


def test_short_answers_do_not_wait_for_long_ones(served: Served, endless: TextModel) -> None:
    with served.client().completions.create(**LONG, stream=True) as stream:
        next(iter(stream))
        (job,) = served.jobs
        long = job.continuation
        served.client().completions.create(**LONG | {"max_tokens": 5})
        assert long.reason is None and len(long.new_tokens) < 100
    assert served.idle()


def test_a_full_queue_refuses_and_says_when_to_come_back(endless: TextModel) -> None:
    with serving(endless, active=1, waiting=1, grace=0.0) as served:
        client = served.client()
        with client.completions.create(**LONG, stream=True) as first, ThreadPoolExecutor(2) as pool:
            next(iter(first))
            second = pool.submit(lambda: client.completions.create(**LONG | {"max_tokens": 2}))
            assert until(lambda: served.worker.n_waiting == 1)
            with pytest.raises(openai.RateLimitError, match="all 2 places are taken; try again in 1 s") as refused:
                client.completions.create(**LONG)
            assert refused.value.response.headers["retry-after"] == "1" and refused.value.code == "queue_full"
            assert httpx.get(served.url + "/health").status_code == 200
            # the official client comes back by itself
            third = pool.submit(lambda: served.client(retries=5).completions.create(**LONG | {"max_tokens": 2}))
            time.sleep(0.3)
            assert not third.done()
            first.close()
            assert second.result(30).choices and third.result(30).choices
    assert served.idle()


def test_a_model_that_fails_fails_one_request(
    served: Served, text_model: TextModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward, calls = text_model.model.forward, iter(range(100))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise IndexError("secret detail")
        return forward(*args, **kwargs)

    client = served.client()
    monkeypatch.setattr(text_model.model, "forward", failing)
    monkeypatch.setattr(text_model, "ends", frozenset())
    with pytest.raises(openai.APIError, match="the model failed on this request") as caught:
        list(client.completions.create(**LONG | {"max_tokens": 9}, stream=True))
    assert "secret" not in str(caught.value) and "secret detail" in caplog.text
    calls = iter(range(100))
    with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
        client.completions.create(**LONG | {"max_tokens": 9})
    assert client.completions.create(**LONG | {"max_tokens": 9}).choices and served.idle()


@pytest.mark.slow
def test_a_crowd_of_clients_loses_nothing(text_model: TextModel) -> None:
    def wanted(number: int) -> str:
        sampling = Sampling(0.9, seed=number)
        continuation = text_model.begin(text_model.encode(f"client {number}"), Options(30, (), sampling))
        return "".join(piece.text for piece in continuation.pieces())

    texts = [wanted(number) for number in range(32)]
    start = threading.Barrier(32)

    def asked(served: Served, number: int) -> str:
        client = served.client()
        words = {"model": "tiny", "max_tokens": 30, "temperature": 0.9, "seed": number}
        start.wait(60)
        if number % 2:
            return client.completions.create(prompt=f"client {number}", **words).choices[0].text
        chunks = client.completions.create(prompt=f"client {number}", stream=True, **words)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with serving(text_model) as served, ThreadPoolExecutor(32) as pool:
        assert list(pool.map(lambda number: asked(served, number), range(32))) == texts
        assert served.idle()


def test_the_end_lets_running_answers_finish_and_refuses_new_ones(endless: TextModel) -> None:
    with serving(endless) as served:
        client = served.client()
        held = httpx.Client(base_url=served.url)
        assert held.get("/health").status_code == 200
        with client.completions.create(**LONG | {"max_tokens": 200}, stream=True) as stream:
            chunks = [next(iter(stream))]
            served.stop()
            assert until(lambda: served.worker.closing)
            with pytest.raises((httpx.HTTPError, openai.APIConnectionError)):
                httpx.get(served.url + "/health").raise_for_status()
            chunks += list(stream)
        held.close()
        assert chunks[-1].choices[0].finish_reason == "length"
        served.thread.join(20)
        assert not served.thread.is_alive()


def test_the_end_tells_answers_that_would_take_too_long(endless: TextModel) -> None:
    with serving(endless, grace=0.3) as served, ThreadPoolExecutor(1) as pool:
        client = served.client()
        whole = pool.submit(lambda: client.completions.create(**LONG))
        with client.completions.create(**LONG, stream=True) as stream:
            next(iter(stream))
            assert until(lambda: served.worker.n_active == 2)
            served.stop()
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                list(stream)
        with pytest.raises(openai.InternalServerError, match="the server is shutting down"):
            whole.result(20)
