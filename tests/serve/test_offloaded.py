"""A model larger than its memory, served: the same texts as in memory, several at a time."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from moestro.export import open_model
from moestro.generation import Options, Sampling, TextModel
from moestro.offload.session import Plan, Session
from moestro.offload.text_model import text_model
from tests.offload.models import memory_for, tiny_folder
from tests.serve.conftest import Served, serving
from tests.stock_models import byte_tokenizer


def test_texts_that_take_turns_are_those_of_the_model_in_memory(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "mixtral", vocab_size=257, num_local_experts=6)
    byte_tokenizer(folder).save_pretrained(folder)
    whole = TextModel(*open_model(folder))
    prompts = ["the quick", "brown", "a fox that"]
    want = [alone(whole, prompt) for prompt in prompts]
    for host in (False, True):
        plan = Plan(memory_for(folder, 2), host=host, depth=1)
        with Session(folder, plan, poison=True) as session, text_model(session) as model:
            with serving(model) as served, ThreadPoolExecutor(3) as pool:
                assert list(pool.map(partial(completed, served), prompts)) == want
            assert session.counts.misses_high > 12


def completed(served: Served, prompt: str) -> str:
    answer = served.client().completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
    return answer.choices[0].text


def alone(model: TextModel, prompt: str) -> str:
    options = Options(8, (), Sampling(0.0))
    return "".join(piece.text for piece in model.begin(model.encode(prompt), options).pieces())
