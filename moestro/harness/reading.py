"""What the tasks' YAML files call: rows of local files, contexts with examples, counts of text."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LETTERS = "ABCDEFGHIJ"
# a title of WikiText: one equals sign on each side, where sections have more
TITLE = re.compile(r"^ = (?!=)[^\n]*(?<!= )= \n", re.MULTILINE)


def rows(data: str = ".", files: Mapping[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """{split: rows} of JSON Lines in the folder `data`, as `lm-eval` asks for them (`custom_dataset`).

    Raises: FileNotFoundError, ValueError as `read_rows`.
    """
    return {split: _dataset(read_rows(Path(data) / file)) for split, file in (files or {}).items()}


def subjects(data: str = ".", questions: str = "", examples: str = "", shots: int = 5, **_: Any) -> dict[str, Any]:
    """Questions of MMLU, each with the first `shots` examples of its subject before it (Hendrycks 2021,
    arXiv:2009.03300).

    `lm-eval` itself would need a task for every subject.

    Raises: FileNotFoundError, ValueError as `read_rows`.
    """
    solved: dict[str, list[str]] = {}
    for row in read_rows(Path(data) / examples):
        solved.setdefault(row["subject"], []).append(f"{_question(row)} {LETTERS[row['gold']]}\n\n")
    asked = []
    for row in read_rows(Path(data) / questions):
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file.

    Raises: FileNotFoundError; ValueError for a line that is no JSON object, or an empty file.
    """
    found = list(_objects(_existing(path)))
    if not found:
        raise ValueError(f"{path}: no rows")
    return found


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object")
            yield row


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
