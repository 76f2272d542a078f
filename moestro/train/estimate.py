"""How much memory training a model takes, on paper: the model may be on the meta device, and nothing is allocated."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from moestro.cost import Kept
from moestro.train.settings import TrainSettings
from moestro.train.tables import quantized_tables, row_tables

FLOAT32 = 4
# Bytes of a number that matrices multiply.
ITEMSIZE = {"fp32": 4, "bf16": 2}
# Bytes for every logit of a micro-batch when its backward pass begins: itself, and in float32 log p, the gradients of
# log p and of the logit. Held-out text, which has no gradients, needs less. Of that the logit alone outlives the head.
PER_LOGIT = {"fp32": 16, "bf16": 14}
# Of a row of a table: the steps that touched it, and the decay that it has had (`RowAdamW`).
ROW_CLOCKS = 4 + 8
# Of a row met, where gradients are factors: token, place in order, coefficient, id, start (`FactoredRows`).
ROW_FACTORS = 8 + 8 + 4 + 8 + 8
# What a process holds besides tensors (interpreter and libraries), and what an allocator loses between them.
PROCESS = 400 * 2**20
FRAGMENTS = 0.08


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, at the moment of a step that needs most: `parameters` with the copies that autocast makes,
    `tables` of row-sparse gradients with all that their optimizer keeps, `optimizer` of the others; `allowance` for the
    process itself and what allocators lose."""

    parameters: float
    optimizer: float
    tables: float
    gradients: float
    activations: float
    logits: float

    @property
    def tensors(self) -> float:
        """All tensors together."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def allowance(self) -> float:
        """What is there besides tensors."""
        return PROCESS + FRAGMENTS * self.tensors

    @property
    def total(self) -> float:
        """Tensors and allowance."""
        return self.tensors + self.allowance

    def parts(self) -> dict[str, float]:
        """The bytes by name; they sum to `total`."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "allowance": self.allowance}


def estimate_memory(model: Any, vocab_size: int, seq_len: int, settings: TrainSettings) -> MemoryEstimate:
    """Memory of one process that trains `model`, a decoder of ours or a `Hosted`, with our loop: weights are float32,
    all experts equally likely.

    Gradients and activations are there together from the second micro-batch of a step on; with a single one, whichever
    is more counts. An estimate: tests hold the tensors of small runs within 20 % of it.
    """
    tokens = settings.micro_batch * seq_len
    dense, frozen = dense_parameters(model)
    logits = float(tokens * vocab_size * PER_LOGIT[settings.precision])
    gone = float(tokens * vocab_size) * (PER_LOGIT[settings.precision] - ITEMSIZE[settings.precision])
    kept, working = activation_bytes(model.kept_per_token(), tokens, model_width(model), settings)
    activations = kept + max(working - gone, 0.0)
    gradients = float(FLOAT32 * dense)
    if settings.accumulate == 1:
        gradients = max(gradients - activations - logits, 0.0)
    return MemoryEstimate(
        parameters=FLOAT32 * (dense + frozen) + cast_bytes(model, dense + frozen, settings),
        optimizer=2.0 * FLOAT32 * dense,
        tables=table_bytes(model, settings),
        gradients=gradients + row_gradient_bytes(model, tokens, settings),
        activations=activations,
        logits=logits,
    )


def dense_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers in parameters with gradients of every number, and in those without any; tables of rows are neither."""
    tables = {id(table) for table in row_tables(model)}
    others = [p for p in model.parameters() if id(p) not in tables]
    frozen = sum(p.numel() for p in others if not p.requires_grad)
    return sum(p.numel() for p in others) - frozen, frozen


def model_width(model: nn.Module) -> int:
    """Width of the residual stream: that of the token embeddings."""
    return next(m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding))


def cast_bytes(model: nn.Module, n_parameters: int, settings: TrainSettings) -> float:
    """Copies of weights in the dtype of matrix products, which a step keeps: all but embeddings'."""
    looked_up = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    return 0.0 if settings.precision == "fp32" else 2.0 * (n_parameters - sum(looked_up.values()))


def activation_bytes(blocks: list[Kept], tokens: int, d_model: int, settings: TrainSettings) -> tuple[float, float]:
    """What a micro-batch's forward pass keeps until the head is done: tokens * (sum over blocks, and what the head
    reads); and what a block's backward pass then works with, taken to be as much as the largest block keeps. With
    `recompute` the float32 input of every block is kept, and one block at a time works with twice as much."""
    each = [kept.total(ITEMSIZE[settings.precision]) for kept in blocks]
    stream = FLOAT32 * d_model
    kept = stream * len(each) if settings.recompute else sum(each)
    working = max(each) * (2 if settings.recompute else 1)
    return tokens * (kept + 2.0 * stream), tokens * working


def table_bytes(model: nn.Module, settings: TrainSettings) -> float:
    """Tables of row-sparse gradients with both moments, the second in float32, and two clocks a row; those in 8 bits
    with their scales and the first moment in bfloat16. None where they lie in files."""
    if settings.table_folder is not None:
        return 0.0
    narrow = ITEMSIZE[settings.table_precision]
    tables, codes = row_tables(model), quantized_tables(model)
    whole = [t for t in tables if t not in codes]
    numbers = sum(t.numel() * (2 * narrow + FLOAT32) for t in whole)
    numbers += sum(t.numel() * (1 + ITEMSIZE["bf16"] + FLOAT32) + len(t) * FLOAT32 for t in codes)
    return float(numbers + sum(len(t) * ROW_CLOCKS for t in tables))


def row_gradient_bytes(model: Any, tokens: int, settings: TrainSettings) -> float:
    """Row-sparse gradients of a step: values of the different rows that it meets, twice while micro-batches are summed,
    or, with `optim.fused_rows`, the factors of every micro-batch."""
    total = 0.0
    for met, n_rows, width in tables_met(model):
        if settings.optim.fused_rows:
            total += settings.accumulate * tokens * (FLOAT32 * width + ROW_FACTORS * met)
        else:
            rows = different_rows(n_rows, settings.accumulate * tokens * met)
            total += rows * (FLOAT32 * width + 8) * (1 if settings.accumulate == 1 else 2)
    return total


def different_rows(n_rows: int, met: float) -> float:
    """Rows expected among `met` drawn evenly: n (1 - e^(-m / n))."""
    return n_rows * -math.expm1(-met / n_rows)


def tables_met(model: Any) -> Iterator[tuple[float, int, int]]:
    """Of every table with row-sparse gradients: rows that a token meets, in all layers that have the table together,
    rows, and their width."""
    met: dict[int, float] = {}
    tables = {id(table): table for table in row_tables(model)}
    for layer in model.moe_layers().values():
        for bank in layer.banks():
            for table in bank.row_parameters():
                met[id(table)] = met.get(id(table), 0.0) + layer.router.rows_per_token()
    for key, rows in met.items():
        yield rows, len(tables[key]), tables[key].shape[1]
