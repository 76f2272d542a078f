"""The official client against the server: models, completions, chats, streams, seeds, stops, counts."""

import openai
import pytest

from moestro.generation import Options, Sampling, TextModel
from moestro.serve.chat import render
from tests.serve.conftest import Served

PROMPT = "Once upon a time"


def alone(
    text_model: TextModel, prompt: str | list[int], n: int, sampling: Sampling, stops: tuple[str, ...] = ()
) -> str:
    """The text without a server."""
    ids = text_model.encode(prompt) if isinstance(prompt, str) else prompt
    return "".join(piece.text for piece in text_model.begin(ids, Options(n, stops, sampling)).pieces())


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "moestro"
    with pytest.raises(openai.NotFoundError, match="model 'other' is not served here; allowed: tiny"):
        client.models.retrieve("other")


def test_a_completion_is_the_text_of_its_seed(client: openai.OpenAI, text_model: TextModel) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=7, temperature=0.9, top_p=0.8)
    wanted = alone(text_model, PROMPT, 24, Sampling(0.9, 0.8, seed=7))
    assert found.choices[0].text == wanted and found.object == "text_completion" and found.model == "tiny"
    assert found.choices[0].finish_reason == "length" and found.choices[0].logprobs is None
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (16, 24, 40)


def test_defaults_are_those_of_openai(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPT)
    assert found.usage is not None and found.usage.completion_tokens == 16
    texts = {client.completions.create(model="tiny", prompt=PROMPT).choices[0].text for _ in range(3)}
    assert len(texts) > 1


def test_a_streamed_completion_is_the_same_text(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "seed": 7}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks[:-1])


def test_several_prompts_as_text_or_tokens(client: openai.OpenAI, text_model: TextModel) -> None:
    greedy = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    texts = [alone(text_model, prompt, 6, Sampling()) for prompt in ("ab", "xyz")]
    found = client.completions.create(prompt=["ab", "xyz"], **greedy)
    assert [(choice.index, choice.text) for choice in found.choices] == list(enumerate(texts))
    assert found.usage is not None and (found.usage.prompt_tokens, found.usage.completion_tokens) == (5, 12)
    ids = [text_model.encode("ab"), text_model.encode("xyz")]
    assert [choice.text for choice in client.completions.create(prompt=ids, **greedy).choices] == texts
    assert client.completions.create(prompt=ids[1], **greedy).choices[0].text == texts[1]
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=["ab", "xyz"], stream=True, **greedy):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_stop_sequences_and_top_k(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": 3}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[12:14]
    found = client.completions.create(**asked, stop=[stop, "never\0"])
    assert found.choices[0].text == whole[: whole.index(stop)] and found.choices[0].finish_reason == "stop"
    assert client.completions.create(**asked, stop=stop).choices[0].text == found.choices[0].text
    likeliest = client.completions.create(**asked, extra_body={"top_k": 1}).choices[0].text
    assert likeliest == client.completions.create(**{**asked, "temperature": 0}).choices[0].text


def test_chat_without_a_template(client: openai.OpenAI, text_model: TextModel) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 12, "seed": 5}
    found = client.chat.completions.create(**asked)
    prompt = "System: Be brief.\nUser: Hello\nAssistant:"
    assert found.choices[0].message.content == alone(text_model, prompt, 12, Sampling(1.0, seed=5))
    assert found.choices[0].message.role == "assistant" and found.object == "chat.completion"
    assert found.usage is not None and found.usage.prompt_tokens == len(prompt)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == found.choices[0].message.content
    again = [*messages, found.choices[0].message.model_dump(), {"role": "user", "content": "More"}]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=2).choices


def test_the_end_of_a_plain_chat_is_the_next_turn(text_model: TextModel) -> None:
    prompt, stops, rendered = render(text_model.tokenizer, [{"role": "user", "content": "Hi"}])
    assert (prompt, rendered) == ("User: Hi\nAssistant:", False) and "\nUser:" in stops


def test_chat_with_the_tokenizer_s_template(
    served: Served, client: openai.OpenAI, text_model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(text_model.tokenizer, "chat_template", template)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    found = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **asked)
    assert found.choices[0].message.content == alone(text_model, "<user>Hello<assistant>", 8, Sampling())
    with pytest.raises(openai.BadRequestError, match="chat template refuses these messages: no system here"):
        client.chat.completions.create(messages=[{"role": "system", "content": "x"}], **asked)


def test_a_chat_may_take_what_the_context_leaves(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "x" * 480}]
    found = client.chat.completions.create(model="tiny", messages=messages, seed=1)
    assert found.usage is not None and found.usage.total_tokens <= 512
    assert found.choices[0].finish_reason == ("length" if found.usage.total_tokens == 512 else "stop")
