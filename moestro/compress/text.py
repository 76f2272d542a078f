"""The text that a method looks at, in the tokens of the checkpoint."""

from pathlib import Path

from moestro.compress.methods import Request
from moestro.compress.plan import PlanError
from moestro.compress.source import RunSource, open_source
from moestro.data import (
    Batch,
    FileTokenizer,
    Source,
    StdlibSource,
    TokenData,
    Tokenizer,
    load_tokenizer,
    source_for,
)
from moestro.recipe.evaluation import opened_run

# Windows that go through the model together.
ROWS = 8
STDLIB = "stdlib"


def batches_of(request: Request) -> list[Batch]:
    """Windows of `request.seq_len` tokens spread evenly over the text, about `request.tokens` in all.

    A run's own held-out text where a run is asked about no other.

    Raises: PlanError where there is no text, or the folder has no tokenizer.
    """
    source = open_source(request.source)
    if isinstance(source, RunSource) and request.text is None:
        return list(opened_run(request.source).dataset.val_batches(ROWS, request.tokens))
    data = TokenData(source_of(request), tokenizer_of(request.source), request.seq_len, val_fraction=1.0)
    return list(data.prepare(progress=False).val_batches(ROWS, request.tokens))


def source_of(request: Request) -> Source:
    """A file or folder of text, JSON lines or Parquet; "stdlib" is text that every machine has."""
    if request.text is None:
        raise PlanError(f"{request.method} looks at text: say which (--calib a file or folder, or {STDLIB})")
    if request.text == STDLIB:
        return StdlibSource()
    path = Path(request.text).expanduser()
    if not path.exists():
        raise PlanError(f"--calib {request.text}: no such file or folder, allowed: text, JSON lines, or {STDLIB}")
    return source_for(path)


def tokenizer_of(folder: Path) -> Tokenizer:
    """The checkpoint's own tokenizer.

    Raises: PlanError where it has none that gives text back.
    """
    if (folder / "recipe.yaml").is_file():
        return load_tokenizer(folder / "tokenizer")
    try:
        return load_tokenizer(folder) if (folder / "tokenizer_config.json").is_file() else FileTokenizer(folder)
    except (OSError, ValueError) as error:
        raise PlanError(f"{folder} has no tokenizer that text can be read with: {error}") from error
