"""Requests that cannot be answered: the status, the field at fault, and the shape that OpenAI's clients read."""

import json
from typing import Any

import httpx
import openai
import pytest

from moestro.generation import TextModel
from moestro.serve import ServeSettings, read_api_key
from tests.serve.conftest import Served, serving

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 1}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


def refusal(http: httpx.Client, path: str, content: bytes | dict[str, Any]) -> tuple[int, str | None, str]:
    """(status, field, message) of a request that must fail."""
    body = json.dumps(content).encode() if isinstance(content, dict) else content
    found = http.post(f"/v1/{path}", content=body)
    error = found.json()["error"]
    assert found.status_code >= 400 and set(error) == {"message", "type", "param", "code"}
    return found.status_code, error["param"], error["message"]


@pytest.mark.parametrize(
    ("changed", "param", "message"),
    [
        ({"n": 2}, "n", "n is not supported here; leave it out"),
        ({"logprobs": 0}, "logprobs", "logprobs is not supported"),
        ({"logprobs": 5}, "logprobs", "logprobs is not supported"),
        ({"echo": True}, "echo", "echo is not supported"),
        ({"best_of": 3}, "best_of", "best_of is not supported"),
        ({"suffix": "x"}, "suffix", "suffix is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty is not supported"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "logit_bias is not supported"),
        ({"temprature": 1}, "temprature", "unknown field temprature; allowed: max_tokens, model, prompt, seed, stop,"),
        ({"temperature": 3}, "temperature", "temperature: Input should be less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "temperature: Input should be a valid number"),
        ({"temperature": float("nan")}, "temperature", "temperature: Input should be"),
        ({"top_p": -0.1}, "top_p", "top_p: Input should be greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 512}, "prompt", "the prompt has 1 tokens and 512 new ones are asked for, more than"),
        ({"max_tokens": 10**30}, "prompt", "the prompt has 1 tokens and 1,000,"),
        ({"seed": 2**63}, "seed", "seed: Input should be less than"),
        ({"stop": [""]}, None, "a stop sequence is empty"),
        ({"stop": ["x"] * 17}, "stop", "stop: Input should be a valid string; or List should have at most 16"),
        ({"stop": ["x", 5]}, "stop.1", "stop.1: Input should be a valid string"),
        ({"prompt": [1, "a"]}, "prompt.0", "prompt.0: Input should be a valid string; or Input should be a valid list"),
        ({"prompt": {"a": 1}}, "prompt", "prompt: Input should be a valid string; or"),
        ({"stop": 5}, "stop", "stop: Input should be a valid string"),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"prompt": "a\ud800"}, None, "the prompt is not valid Unicode text at character 1"),
        ({"prompt": []}, "prompt", "prompt: "),
        ({"prompt": "x" * 600}, "prompt", "the prompt has 600 tokens and 1 new ones are asked for"),
        ({"prompt": [1, 400]}, None, "token 400 in the prompt; allowed: 0 to 256"),
        ({"prompt": ["a"] * 100}, "prompt", "100 prompts; allowed: 72"),
        ({"prompt": None}, "prompt", "prompt: Field required"),
        ({"model": "other"}, "model", "model 'other' is not served here; allowed: tiny"),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "unknown field stream_options.usage"),
    ],
)
def test_completions_that_are_refused(http: httpx.Client, changed: dict, param: str | None, message: str) -> None:
    status, field, told = refusal(http, "completions", COMPLETION | changed)
    assert (status, field) == (404 if "model" in changed else 400, param) and told.startswith(message), told


@pytest.mark.parametrize(
    ("changed", "param", "message"),
    [
        ({"messages": []}, "messages", "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "messages.0.role: Input should be 's"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "messages.0.content: Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "messages.0.content.0.type: Input should be 'text'",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported"),
        ({"logprobs": True, "top_logprobs": 2}, "logprobs", "logprobs is not supported"),
        ({"max_completion_tokens": 2}, "max_tokens", "max_tokens and max_completion_tokens are one thing"),
    ],
)
def test_chats_that_are_refused(http: httpx.Client, changed: dict, param: str, message: str) -> None:
    status, field, told = refusal(http, "chat/completions", CHAT | changed)
    assert (status, field) == (400, param) and told.startswith(message), told


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 200_000, b'{"metadata": ' + b"[" * 900 + b"]" * 900 + b"}"],
)
def test_bodies_that_are_no_json_object(http: httpx.Client, content: bytes) -> None:
    status, _, message = refusal(http, "completions", content)
    assert status == 400 and message.startswith("the body is not ")


def test_fields_that_change_nothing_are_taken(http: httpx.Client) -> None:
    neutral = {"n": 1, "logprobs": None, "echo": False, "presence_penalty": 0.0, "user": "me", "logit_bias": {}}
    assert http.post("/v1/completions", json=COMPLETION | neutral).status_code == 200
    chat = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False, "store": True}
    assert http.post("/v1/chat/completions", json=CHAT | chat).status_code == 200


def test_a_body_that_is_too_large(http: httpx.Client) -> None:
    status, _, message = refusal(http, "completions", b" " * 2**21)
    assert (status, message) == (413, "the body has more than 1,048,576 bytes, which is the most")
    chunked = http.post("/v1/completions", content=(b" " * 2**16 for _ in range(32)))
    assert chunked.status_code == 413
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200


def test_addresses_that_do_not_exist(http: httpx.Client) -> None:
    found = http.get("/v1/embeddings")
    assert found.status_code == 404 and "/v1/chat/completions" in found.json()["error"]["message"]
    found = http.get("/v1/completions")
    assert found.status_code == 405 and found.headers["allow"] == "POST"


def test_the_official_client_raises_the_right_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**COMPLETION, n=2)
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "n",
        "unsupported_parameter",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**COMPLETION | {"prompt": "x" * 600})
    assert caught.value.code == "context_length_exceeded"


def test_a_key_is_asked_for_where_one_is_set(text_model: TextModel, caplog: pytest.LogCaptureFixture) -> None:
    with serving(text_model, api_key="correct horse") as served:
        assert served.client("correct horse").completions.create(**COMPLETION).choices
        for wrong in ("correct hors", "correct horsee", "none"):
            with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
                served.client(wrong).models.list()
        for path in ("/v1/models", "/metrics"):
            found = httpx.get(served.url + path)
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
        assert httpx.get(served.url + "/health").status_code == 200
    assert "correct horse" not in caplog.text


def test_where_a_key_comes_from(tmp_path) -> None:
    file = tmp_path / "key"
    file.write_text("abc\n")
    assert read_api_key(file, {"MOESTRO_API_KEY": "other"}) == "abc"
    assert read_api_key(None, {"MOESTRO_API_KEY": "other"}) == "other" and read_api_key(None, {}) is None
    file.write_text(" \n")
    for words in ((file, {}), (None, {"MOESTRO_API_KEY": ""}), (None, {"MOESTRO_API_KEY": "schlüssel"})):
        with pytest.raises(ValueError, match="an API key is printable ASCII"):
            read_api_key(*words)
    assert "abc" not in repr(ServeSettings("x", api_key="abc"))


@pytest.mark.parametrize("options", [{"port": -1}, {"active": 0}, {"waiting": -1}, {"max_body": 0}, {"grace": -1.0}])
def test_settings_out_of_range(options: dict) -> None:
    with pytest.raises(ValueError, match="allowed: "):
        ServeSettings("x", **options)


def test_health_and_metrics(served: Served, http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}

    def counted() -> dict[str, float]:
        lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    before = counted()
    http.post("/v1/completions", json=COMPLETION | {"prompt": "abc", "max_tokens": 4, "temperature": 0})
    http.get("/made/up")
    after = counted()
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    assert gained['moestro_answers_total{endpoint="/v1/completions",status="200"}'] == 1
    assert gained['moestro_answers_total{endpoint="other",status="404"}'] == 1
    assert gained["moestro_prompt_tokens_total"] == 3 and 1 <= gained["moestro_generated_tokens_total"] <= 4
    assert gained["moestro_first_token_seconds_count"] == gained["moestro_answer_seconds_count"] == 1
    assert gained['moestro_answer_seconds_bucket{le="+Inf"}'] == 1
    assert after["moestro_requests_active"] == after["moestro_requests_waiting"] == 0
    assert not [name for name in after if "made" in name]
