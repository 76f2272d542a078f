"""Tasks through lm-eval: against scores written out in loops, from files of a folder of our own making."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.harness import ScoredModel, evaluate_tasks, resolve_tasks, tasks_table
from moestro.harness.catalogue import TASKS
from moestro.harness.reading import articles, choice_rows, read_rows, subjects
from moestro.recipe.syntax import RecipeError
from tests.export.conftest import hosted
from tests.reference.multiple_choice import bits_per_byte, chosen, chosen_context, log_probability, nats
from tests.stock_models import byte_tokenizer, tiny_llama

LONGEST = 48
CHOICES = [
    {"context": "Question: Where?\nAnswer:", "choices": ["in a boat", "at sea", "up the old hill"], "gold": 1},
    {
        "context": "Question: Who?\nAnswer:",
        "choices": ["the fox", "a lazy dog", "nobody", "seven wise owls"],
        "gold": 3,
    },
    {"context": "A sentence that is too long for the context of this model", "choices": ["ends", "is cut"], "gold": 0},
    {"context": "Q: Café?\nA:", "choices": ["oui", "naïve"], "gold": 0},
]
PAIRS = [
    {
        "context_options": ["The fox saw the dog. The fox", "The fox saw the dog. The dog"],
        "continuation": "ran.",
        "gold": 1,
    },
    {"context_options": ["Ann thanked Bea. Ann", "Ann thanked Bea. Bea"], "continuation": "smiled.", "gold": 0},
]
LAST = [{"context": "over the lazy", "continuation": " dog"}, {"context": "the quick brown", "continuation": " fox"}]
PAGES = (
    " \n = Foxes = \n \n A fox runs over <unk> hills . \n = = Food = = \n It eats . \n = Dogs = \n \n A dog sleeps . \n"
)


def logits(tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return MODEL(torch.tensor([tokens])).logits[0]


def encode(text: str) -> list[int]:
    return list(text.encode())


MODEL: Any = None


@pytest.fixture(scope="module", autouse=True)
def model() -> Any:
    global MODEL
    MODEL = tiny_llama(seed=3, context=LONGEST)
    return MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    (data / "eval").mkdir()
    (data / "lm" / "wikitext-2").mkdir(parents=True)
    for name, rows in {"piqa": CHOICES, "winogrande": PAIRS, "lambada": LAST}.items():
        (data / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "lm" / "wikitext-2" / "valid.txt").write_text(PAGES)
    return data


@pytest.fixture(scope="module")
def scored(model: Any, tmp_path_factory: pytest.TempPathFactory) -> ScoredModel:
    return ScoredModel(model, byte_tokenizer(tmp_path_factory.mktemp("bytes")), batch_size=3)


@pytest.fixture(scope="module")
def figures(scored: ScoredModel, folder: Path) -> dict[str, Any]:
    return evaluate_tasks(scored, ["piqa", "winogrande", "lambada", "wikitext"], folder)


def values(figures: dict[str, Any], task: str) -> dict[str, float]:
    return {name: found["value"] for name, found in figures["tasks"][task]["metrics"].items()}


def test_choices_are_those_of_the_reference(figures: dict[str, Any]) -> None:
    picks = [chosen(logits, encode, row["context"], row["choices"], LONGEST) for row in CHOICES]
    shares = [sum(pick[i] == row["gold"] for pick, row in zip(picks, CHOICES, strict=True)) / 4 for i in (0, 1)]
    assert values(figures, "piqa") == {"acc": shares[0], "acc_norm": shares[1]}
    # both normalisations are told apart by this model and these rows
    assert any(by_sum != by_length for by_sum, by_length in picks)
    deviation = (shares[0] * (1 - shares[0]) / 3) ** 0.5
    assert figures["tasks"]["piqa"]["metrics"]["acc"]["stderr"] == pytest.approx(deviation)
    assert figures["tasks"]["piqa"]["n"] == 4 and figures["tasks"]["piqa"]["cut"] == pytest.approx(2 / 11)


def test_a_continuation_is_scored_under_each_context(figures: dict[str, Any]) -> None:
    picks = [chosen_context(logits, encode, row["context_options"], row["continuation"], LONGEST) for row in PAIRS]
    right = sum(pick == row["gold"] for pick, row in zip(picks, PAIRS, strict=True)) / 2
    assert values(figures, "winogrande") == {"acc": right}


def test_last_words(figures: dict[str, Any]) -> None:
    found = [log_probability(logits, encode(row["context"]), encode(row["continuation"]), LONGEST) for row in LAST]
    mean = sum(score for score, _ in found) / 2
    wanted = {"perplexity": float(torch.tensor(-mean).exp()), "acc": sum(hit for _, hit in found) / 2}
    assert values(figures, "lambada") == pytest.approx(wanted, rel=1e-5)


def test_bits_per_byte_of_articles(figures: dict[str, Any]) -> None:
    pages = [page["page"] for page in articles(data="", file=str(_written(PAGES)))["validation"]]
    assert "".join(pages) == PAGES and [page.split("=")[1].strip() for page in pages] == ["Foxes", "Dogs"]
    total = sum(nats(logits, encode(page), 256, LONGEST) for page in pages)
    found = values(figures, "wikitext")
    assert found["bits_per_byte"] == pytest.approx(bits_per_byte(total, PAGES), rel=1e-5)
    words = len(PAGES.split())
    assert found["word_perplexity"] == pytest.approx(float(torch.tensor(total / words).exp()), rel=1e-4)


def _written(text: str) -> Path:
    import tempfile

    file = Path(tempfile.mkdtemp()) / "text.txt"
    file.write_text(text)
    return file


def test_a_limit_takes_the_first_rows_and_the_table_says_so(scored: ScoredModel, folder: Path) -> None:
    from rich.console import Console

    found = evaluate_tasks(scored, ["piqa"], folder, limit=1)
    row = CHOICES[0]
    pick = chosen(logits, encode, row["context"], row["choices"], LONGEST)
    assert found["tasks"]["piqa"]["n"] == 1 and values(found, "piqa")["acc"] == (pick[0] == row["gold"])
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(tasks_table({"model": "runs/x", **found}))
    text = console.export_text()
    assert "runs/x, lm-eval" in text and "the first 1 rows" in text and "acc_norm" in text


def test_mmlu_has_five_examples_of_its_subject(tmp_path: Path) -> None:
    def row(subject: str, number: int) -> dict[str, Any]:
        return {"subject": subject, "question": f"{subject} {number}?", "choices": ["w", "x", "y", "z"], "gold": 2}

    solved = [row(subject, n) for n in range(7) for subject in ("high_school_maths", "law")]
    (tmp_path / "dev").write_text("".join(json.dumps(each) + "\n" for each in solved))
    (tmp_path / "asked").write_text(json.dumps(row("high_school_maths", 99)))
    (found,) = subjects(data=str(tmp_path), questions="asked", examples="dev")["validation"]
    paragraphs = found["context"].split("\n\n")
    assert paragraphs[0] == "The following are multiple choice questions (with answers) about high school maths."
    assert paragraphs[1:6] == [f"high_school_maths {n}?\nA. w\nB. x\nC. y\nD. z\nAnswer: C" for n in range(5)]
    assert paragraphs[6] == "high_school_maths 99?\nA. w\nB. x\nC. y\nD. z\nAnswer:" and len(paragraphs) == 7
    assert (found["choices"], found["gold"]) == (["A", "B", "C", "D"], 2)


def test_names_of_tasks(tmp_path: Path) -> None:
    suite = ["arc_easy", "boolq", "hellaswag", "lambada", "piqa", "siqa", "wikitext", "winogrande"]
    assert resolve_tasks(["mmlu", "papers", "piqa"]) == ["mmlu", *suite]
    own = str(TASKS / "piqa.yaml")
    assert resolve_tasks([own]) == [own]
    with pytest.raises(RecipeError, match="unknown task 'piqua'; did you mean 'piqa'"):
        resolve_tasks(["piqua"])
    with pytest.raises(RecipeError, match="no such task file: mine.yaml"):
        resolve_tasks(["mine.yaml"])
    for content, message in (
        ("task: [", "not valid YAML"),
        ("just text", "not a mapping"),
        ("task: x", "none of include"),
    ):
        (tmp_path / "mine.yaml").write_text(content)
        with pytest.raises(RecipeError, match=message):
            resolve_tasks([str(tmp_path / "mine.yaml")])


def test_a_task_file_of_ones_own(scored: ScoredModel, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"include: {TASKS / '_choices.yaml'}\ntask: mine\ndataset_kwargs: {{files: {{validation: eval/piqa.jsonl}}}}"
    )
    assert values(evaluate_tasks(scored, [str(file)], folder), "mine") == values(
        evaluate_tasks(scored, ["piqa"], folder), "piqa"
    )


def test_data_that_is_missing_or_malformed(scored: ScoredModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="eval/boolq.jsonl: no such file; --data names the folder"):
        evaluate_tasks(scored, ["boolq"], folder)
    for content, message in (
        ("", "no rows"),
        ('{"a": 1}\n{', "line 2: not valid JSON"),
        ("[]", "line 1: not a JSON o"),
        ("{}\n\udcff", "line 2: not valid JSON"),
    ):
        (tmp_path / "rows.jsonl").write_text(content, errors="surrogateescape")
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"context": 5}, "'context' is not text"),
        ({"choices": "bc"}, "'choices' is not a list of texts"),
        ({"choices": ["b", 3]}, "'choices' is not a list of texts"),
        ({"choices": []}, "'choices' is not a list of texts"),
        ({"gold": None}, "'gold' is None; allowed: 0 to 1"),
        ({"gold": 2}, "'gold' is 2; allowed: 0 to 1"),
        ({"gold": -1}, "'gold' is -1; allowed: 0 to 1"),
        ({"gold": "1"}, "'gold' is '1'; allowed: 0 to 1"),
    ],
)
def test_rows_without_what_a_task_needs(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    whole = {"context": "a", "choices": ["b", "c"], "gold": 1}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (whole, whole | changed)))
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: {message}"):
        choice_rows(str(tmp_path), {"validation": "rows.jsonl"})


def test_continuations_that_cannot_be_scored(scored: ScoredModel, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    file = tmp_path / "eval" / "lambada.jsonl"
    for continuation, message in (("x" * 60, "does not fit into the model's context of 48"), ("", "has no tokens")):
        file.write_text(json.dumps({"context": "a", "continuation": continuation}))
        with pytest.raises(ValueError, match=message):
            evaluate_tasks(scored, ["lambada"], tmp_path)


@pytest.mark.slow
def test_every_task_reads_the_real_data(shared_data: Path, tmp_path: Path) -> None:
    names = sorted(file.stem for file in TASKS.glob("[!_]*.yaml"))
    scored = ScoredModel(tiny_llama(context=1024), byte_tokenizer(tmp_path))
    found = evaluate_tasks(scored, names, shared_data, limit=2)
    assert sorted(found["tasks"]) == names and all(each["n"] == 2 for each in found["tasks"].values())


def test_what_looks_at_later_tokens_is_scored_alone(tmp_path: Path) -> None:
    for name, size in (("hmoe", 3), ("expert_choice", 1), ("mixture_of_depths", 1)):
        assert ScoredModel(hosted(name), byte_tokenizer(tmp_path), batch_size=3).batch_size == size
