"""What a plan has to know of a recipe: sizes and costs, read off a model on the meta device."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moestro.cost import Kept
from moestro.experts import ExpertBank
from moestro.parallel.parallelize import outermost
from moestro.recipe.bind import Part
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import Recipe
from moestro.recipe.syntax import RecipeError
from moestro.routers import Router
from moestro.routers.query_norm import BatchQueryNorm
from moestro.train.estimate import model_width, table_bytes, tables_met
from moestro.train.settings import TrainSettings
from moestro.train.tables import row_tables

# Experts whose places are decided one by one; more of them are rows of tables.
MOST_SPREAD = 4096


@dataclass(frozen=True)
class Mixture:
    """A bank whose experts can be spread over ranks: hidden units, parameters and forward FLOPs a row of every expert,
    and the rows of a token."""

    name: str
    widths: tuple[float, ...]
    parameters: tuple[float, ...]
    row_flops: float
    rows: float


@dataclass(frozen=True)
class Tables:
    """Tables of row-sparse gradients: rows that a token meets in all layers that have the table, rows of a table,
    width, and how many such tables there are in the model."""

    rows: float
    n_rows: int
    width: int
    count: int


@dataclass(frozen=True)
class Lookup:
    """One layer that meets such tables: rows a token, their width, and how many tables have each row."""

    rows: float
    width: int
    tables: int


@dataclass(frozen=True)
class Workload:
    """A recipe in numbers. Parameters: `blocks` those of every block and `rest` those outside (embedding, norm, head),
    without experts that can be spread (`mixtures`) and `tables`, which `lookups` meet; `frozen` of them do not learn.
    FLOPs of a token: `token_flops` of a forward pass, `training_flops` of both without recomputation. `kept` by a token
    in every block, `query_features` of every layer with statistics over the batch, `routers` that have weights."""

    name: str
    settings: TrainSettings
    vocab_size: int
    seq_len: int
    d_model: int
    blocks: tuple[int, ...]
    rest: int
    frozen: int
    token_flops: float
    training_flops: float
    kept: tuple[Kept, ...]
    mixtures: tuple[Mixture, ...]
    unspread: tuple[str, ...]
    tables: tuple[Tables, ...]
    lookups: tuple[Lookup, ...]
    table_bytes: float
    query_features: tuple[int, ...]
    routers: int

    @property
    def dense(self) -> int:
        """Parameters that are sharded like a dense model's."""
        return sum(self.blocks) + self.rest

    @property
    def experts(self) -> float:
        """Parameters of experts that can be spread."""
        return sum(sum(mixture.parameters) for mixture in self.mixtures)

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.settings.batch_size * self.seq_len


def workload(recipe: Recipe, vocab_size: int | None = None) -> Workload:
    """The recipe's numbers, its model never in memory.

    Raises: RecipeError where the vocabulary is not known before the data is prepared, or a part refuses its values, or
    no sequence has the length asked for.
    """
    settings = build_training(recipe)[0]
    vocabulary = vocab_size or vocabulary_of(recipe.data.value("tokenizer"))
    model: Any = build_model(recipe, vocabulary, "meta")
    seq_len = checked_length(recipe)
    banks = {name: bank for name, bank in named_banks(model).items() if not bank.row_parameters()}
    spread = {name: bank for name, (bank, _) in _with_layers(model).items() if name in banks and spreadable(bank)}
    apart = {id(p) for bank in spread.values() for p in bank.parameters()} | {id(p) for p in row_tables(model)}
    return Workload(
        name=recipe.name,
        settings=settings,
        vocab_size=vocabulary,
        seq_len=seq_len,
        d_model=model_width(model),
        blocks=tuple(counted(model.blocks, apart)),
        rest=sum(counted([model], apart | {id(p) for block in model.blocks for p in block.parameters()})),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        token_flops=model.expected_token_flops(seq_len),
        training_flops=model.expected_training_flops(seq_len),
        kept=tuple(model.kept_per_token()),
        mixtures=tuple(mixture(name, *_with_layers(model)[name]) for name in spread),
        unspread=tuple(name for name in banks if name not in spread),
        tables=tuple(tables_of(model)),
        lookups=tuple(lookups_of(model)),
        table_bytes=table_bytes(model, settings),
        query_features=tuple(m.features for m in model.modules() if isinstance(m, BatchQueryNorm)),
        routers=len(outermost(model, Router)),
    )


def checked_length(recipe: Recipe) -> int:
    """`data.seq_len`, whose data is not prepared here.

    Raises: RecipeError where no sequence has that length.
    """
    seq_len = recipe.data.value("seq_len")
    if seq_len < 1:
        message = f"seq_len={seq_len}; allowed: at least 1"
        raise recipe.data.blamed(message).error(message)
    return seq_len


def vocabulary_of(tokenizer: Part | Any) -> int:
    """The size of a vocabulary that a recipe itself says: that of bytes, or the one to train.

    Raises: RecipeError for tokenizers that are read from files.
    """
    if isinstance(tokenizer, Part):
        if "vocab_size" in tokenizer.keywords:
            return tokenizer.keywords["vocab_size"]
        if isinstance(size := getattr(tokenizer.make, "vocab_size", None), int):
            return size
    raise RecipeError("the size of this tokenizer's vocabulary is known when it is read: give it with --vocab")


def named_banks(model: nn.Module) -> dict[str, ExpertBank]:
    """Every bank once, by its name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertBank)}


def _with_layers(model: Any) -> dict[str, tuple[ExpertBank, Any]]:
    """Banks by name, each with the first layer that has it as a branch."""
    layers = list(model.moe_layers().values())
    found: dict[str, tuple[ExpertBank, Any]] = {}
    for name, bank in named_banks(model).items():
        for layer in layers:
            if any(branch is bank for branch in layer.branches):
                found[name] = bank, layer
                break
    return found


def spreadable(bank: ExpertBank) -> bool:
    """Whether every expert's weights are its own, so that experts can lie on different ranks."""
    if (
        bank.owner()[0] is not bank
        or bank.n_experts > MOST_SPREAD
        or bank.shared_parameters()
        or not any(True for _ in bank.parameters())
    ):
        return False
    try:
        covered = {id(parameter) for parameter, _ in bank.weights_of(0)}
    except NotImplementedError:
        return False
    return bool(covered) and all(id(parameter) in covered for parameter in bank.parameters())


def mixture(name: str, bank: ExpertBank, layer: Any) -> Mixture:
    """A bank in numbers; a row costs the mean over experts."""
    n = bank.n_experts
    each = _listed(bank.row_flops(), n)
    widths, own = _listed(bank.row_widths(), n), _listed(bank.own_parameters(), n)
    return Mixture(name, widths, own, sum(each) / n, layer.router.rows_per_token())


def _listed(value: Tensor | float, n: int) -> tuple[float, ...]:
    return tuple(value.tolist()) if isinstance(value, Tensor) else (float(value),) * n


def counted(modules: Iterable[nn.Module], apart: set[int]) -> Iterator[int]:
    """Parameters of every module, but those `apart`, and those that one before it has."""
    seen = set(apart)
    for module in modules:
        own = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
        seen |= own.keys()
        yield sum(own.values())


def tables_of(model: Any) -> Sequence[Tables]:
    """Tables of one shape and use together."""
    found: dict[tuple[float, int, int], int] = {}
    for key in tables_met(model):
        found[key] = found.get(key, 0) + 1
    return [Tables(*key, n) for key, n in found.items()]


def lookups_of(model: Any) -> Iterator[Lookup]:
    """Layer by layer, also of those that share their tables."""
    for layer in model.moe_layers().values():
        for bank in layer.banks():
            if tables := bank.row_parameters():
                yield Lookup(layer.router.rows_per_token(), tables[0].shape[1], len(tables))


def training_flops(work: Workload, recompute: bool) -> float:
    """FLOPs of a token, forward and backward; with recomputation the forward pass of all but the head twice."""
    head = 2.0 * work.d_model * work.vocab_size
    return work.training_flops + (work.token_flops - head if recompute else 0.0)
