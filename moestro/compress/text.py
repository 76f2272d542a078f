"""The text that a method looks at, heals on or is measured by, in the tokens of the checkpoint."""

from dataclasses import replace
from pathlib import Path

from moestro.compress.healing_steps import Text
from moestro.compress.methods import Request
from moestro.compress.plan import PlanError
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
from moestro.data.batches import epoch_order
from moestro.recipe.evaluation import opened_run

# Windows that go through the model together.
ROWS = 8
STDLIB = "stdlib"
# what is asked of held-out text, in the place of a method
PERPLEXITY = "perplexity"


def batches_of(request: Request) -> list[Batch]:
    """Windows of `request.seq_len` tokens spread evenly over the text, about `request.tokens` in all: what a method
    looks at. A run's own training text where a run is asked about no other.

    Raises: PlanError where there is no text, or the folder has no tokenizer.
    """
    if not _own_text(request):
        return _windows(request)
    dataset = opened_run(request.source).dataset
    tokens = min(request.tokens, dataset.n_train_tokens)
    count = max(1, tokens // (ROWS * dataset.seq_len))
    return [dataset.train_batch(number, ROWS, request.seed) for number in range(count)]


def held_out_of(request: Request) -> list[Batch]:
    """As `batches_of`, to be measured by: of a run's own text what training did not see.

    Raises: as `batches_of`.
    """
    if not _own_text(request):
        return _windows(request)
    return list(opened_run(request.source).dataset.val_batches(ROWS, request.tokens))


def healing_text(request: Request, steps: int) -> Text:
    """The batch of every step of a healing: the text in an order of the seed's, again from its beginning where it is
    over; a run's own training text where a run is asked about no other.

    Raises: as `batches_of`.
    """
    if _own_text(request):
        dataset = opened_run(request.source).dataset
        return lambda step: dataset.train_batch(step, ROWS, request.seed)
    batches = _windows(replace(request, tokens=steps * ROWS * request.seq_len))

    def batch(step: int) -> Batch:
        epoch, place = divmod(step, len(batches))
        return batches[epoch_order(request.seed, epoch, len(batches))[place]]

    return batch


def _own_text(request: Request) -> bool:
    return request.text is None and (request.source / "recipe.yaml").is_file()


def _windows(request: Request) -> list[Batch]:
    data = TokenData(source_of(request), tokenizer_of(request.source), request.seq_len, val_fraction=1.0)
    return list(data.prepare(progress=False).val_batches(ROWS, request.tokens))


def source_of(request: Request) -> Source:
    """A file or folder of text, JSON lines or Parquet; "stdlib" is text that every machine has."""
    if request.text is None:
        raise PlanError(f"{request.method} looks at text: say which ({_option(request)} a file or folder, or {STDLIB})")
    if request.text == STDLIB:
        return StdlibSource()
    path = Path(request.text).expanduser()
    if not path.exists():
        raise PlanError(
            f"{_option(request)} {request.text}: no such file or folder, allowed: text, JSON lines, or {STDLIB}"
        )
    return source_for(path)


def _option(request: Request) -> str:
    """The option that names the text."""
    return "--eval" if request.method == PERPLEXITY else "--calib"


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
