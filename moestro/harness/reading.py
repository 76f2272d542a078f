"""What the tasks' YAML files call: rows of local files, contexts with examples, counts of text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LETTERS = "ABCDEFGHIJ"
MMLU_TEXTS = ("subject", "question")
# a title of WikiText: one equals sign on each side, where sections have more
TITLE = re.compile(r"^ = (?!=)[^\n]*(?<!= )= \n", re.MULTILINE)


def choice_rows(data: str = ".", files: Mapping[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """{split: rows {context, choices, gold}} of JSON Lines in the folder `data`, as `lm-eval` asks for them
    (`custom_dataset`).

    Raises: FileNotFoundError, ValueError as `read_rows`.
    """
    return _splits(data, files, ("context",), "choices")


def context_rows(data: str = ".", files: Mapping[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """As `choice_rows`, of rows {context_options, continuation, gold}."""
    return _splits(data, files, ("continuation",), "context_options")


def continuation_rows(data: str = ".", files: Mapping[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """As `choice_rows`, of rows {context, continuation}."""
    return _splits(data, files, ("context", "continuation"), None)


def subjects(data: str = ".", questions: str = "", examples: str = "", shots: int = 5, **_: Any) -> dict[str, Any]:
    """Questions of MMLU, each with the first `shots` examples of its subject before it (Hendrycks 2021,
    arXiv:2009.03300).

    `lm-eval` itself would need a task for every subject.

    Raises: FileNotFoundError, ValueError as `read_rows`.
    """
    solved: dict[str, list[str]] = {}
    for row in read_rows(Path(data) / examples, MMLU_TEXTS, "choices"):
        solved.setdefault(row["subject"], []).append(f"{_question(row)} {LETTERS[row['gold']]}\n\n")
    asked = []
    for row in read_rows(Path(data) / questions, MMLU_TEXTS, "choices"):
        subject = row["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        context = head + "".join(solved.get(row["subject"], [])[:shots]) + _question(row)
        letters = list(LETTERS[: len(row["choices"])])
        asked.append({"context": context, "choices": letters, "gold": row["gold"], "subject": row["subject"]})
    return {"validation": _dataset(asked)}


def articles(data: str = ".", file: str = "", **_: Any) -> dict[str, Any]:
    """The articles of a text of WikiText, one row {"page": text} each, together the whole text.

    Raises: FileNotFoundError; ValueError where the text is empty.
    """
    text = _existing(Path(data) / file).read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{Path(data) / file}: no text")
    starts = [found.start() for found in TITLE.finditer(text) if text[: found.start()].strip()]
    pages = [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]
    return {"validation": _dataset([{"page": page} for page in pages])}


def text_counts(doc: Mapping[str, str], results: tuple[float]) -> dict[str, tuple[float, int]]:
    """Log likelihood of a page with the words and the bytes of the very text that was scored."""
    (log_likelihood,), text = results, doc["page"]
    n_words, n_bytes = len(text.split()), len(text.encode())
    return {
        "word_perplexity": (log_likelihood, n_words),
        "byte_perplexity": (log_likelihood, n_bytes),
        "bits_per_byte": (log_likelihood, n_bytes),
    }


def read_rows(path: Path, texts: Sequence[str] = (), options: str | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file: the fields `texts` hold text, `options` a list of texts, and `gold` then the
    number of the right one. `lm-eval` itself would score a row without a right choice as wrong, without a word.

    Raises: FileNotFoundError; ValueError for a line that is no such JSON object, or an empty file.
    """
    found = []
    for number, row in _objects(_existing(path)):
        if fault := _fault(row, texts, options):
            raise ValueError(f"{path}, line {number}: {fault}")
        found.append(row)
    if not found:
        raise ValueError(f"{path}: no rows")
    return found


def _splits(data: str, files: Mapping[str, str] | None, texts: Sequence[str], options: str | None) -> dict[str, Any]:
    return {split: _dataset(read_rows(Path(data) / file, texts, options)) for split, file in (files or {}).items()}


def _fault(row: Mapping[str, Any], texts: Sequence[str], options: str | None) -> str | None:
    for name in texts:
        if not isinstance(row.get(name), str):
            return f"{name!r} is not text"
    if options is None:
        return None
    several, gold = row.get(options), row.get("gold")
    if not isinstance(several, list) or not several or not all(isinstance(each, str) for each in several):
        return f"{options!r} is not a list of texts"
    if type(gold) is not int or not 0 <= gold < len(several):
        return f"'gold' is {gold!r}; allowed: 0 to {len(several) - 1}"
    return None


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object")
            yield number, row


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --data names the folder that the task's files lie in")
    return path


def _question(row: Mapping[str, Any]) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    return f"{row['question'].strip()}\n{choices}Answer:"


def _dataset(found: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(found)
