"""The `adapt` section: a run that starts from another's weights, and what learns beside them."""

from dataclasses import dataclass
from pathlib import Path

from moestro.data import Tokenizer, load_tokenizer
from moestro.layers import LowRankMixtures, adapt
from moestro.model import Transformer
from moestro.recipe.bind import Part
from moestro.recipe.syntax import RecipeError
from moestro.train.checkpoint import CheckpointError
from moestro.train.weights import load_weights, newest_checkpoint


@dataclass(frozen=True)
class Adapt:
    """`start` is the folder of the run whose newest weights the model starts with (its recipe says what `model` must
    say here); None for those of the seed. `mixtures` go around every linear map whose name has the regular expression
    `targets` in it; with `freeze` they alone learn. Without mixtures all of the model does."""

    start: Path | None = None
    targets: str = r"attention\.|expert\."
    mixtures: LowRankMixtures | None = None
    freeze: bool = True


def start_adapted(section: Part, model: Transformer, from_start: bool, allow_non_causal: bool) -> None:
    """Give a model the weights it starts with (`from_start`; a checkpoint will else), then its adapters.

    Raises: RecipeError where there are no such weights, they are another model's, or adapters do not fit.
    """
    plan: Adapt = section.build()
    if from_start and plan.start is not None:
        try:
            load_weights(model, newest_checkpoint(plan.start))
        except CheckpointError as error:
            raise (section.place / "start").error(str(error)) from error
    if plan.mixtures is not None:
        try:
            adapt(model, plan.targets, plan.mixtures, plan.freeze, allow_non_causal)
        except RecipeError:
            raise
        except ValueError as error:
            raise section.place.error(str(error)) from error


def require_same_tokenizer(section: Part, tokenizer: Tokenizer) -> None:
    """Raises: RecipeError where the run that a recipe starts from reads text through another tokenizer."""
    start = section.build().start
    if start is None:
        return
    folder = Path(start) / "tokenizer"
    if not folder.is_dir():
        raise (section.place / "start").error(f"{start} is not the folder of a run: it holds no tokenizer")
    if load_tokenizer(folder).fingerprint() != tokenizer.fingerprint():
        raise (section.place / "start").error(
            f"the run in {start} reads text through another tokenizer; allowed: its own, "
            f"data.tokenizer={{kind: file, path: {folder}}}"
        )
