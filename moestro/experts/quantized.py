"""One-neuron experts in 8 bits a number: a quarter of the memory, trained so or after their training."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Kept
from moestro.experts.base import ExpertBank
from moestro.experts.singleton import GLUSingletonBank, SingletonBank, one_neuron_each
from moestro.experts.tables import output_rows_std
from moestro.ops.activations import activation as find
from moestro.ops.quantized import QuantizedTable, Storage, quantize_rows, quantized_singletons
from moestro.ops.row_gradients import pending_factors
from moestro.ops.tables import new_table
from moestro.routing import Routing, SparseRouting

# The standard deviation that outputs start with, as other banks have it.
OUTPUT_STD = 0.6


class QuantizedBank(ExpertBank):
    """`SingletonBank`, or with `glu` `GLUSingletonBank`, whose tables are kept in 8 bits: `int8`, or `fp8` (e4m3), each
    row with a float32 scale (`ops.quantized`). Rows start as those of the other banks do with softmax gates, rounded;
    `quantized` makes one from a trained bank.

    Its tables are buffers, and fixed, but with `sparse_gradients`: then `RowAdamW` replaces the rows that were met,
    rounded stochastically, from factors of their gradients (`optim.fused_rows`), because numbers in 8 bits have none.
    Tokens have to meet equally many, and ranks do not share them.

    fp8 is kept as its bits (uint8), which conversions of a whole model leave alone.
    """

    storage: str

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        activation: str = "gelu",
        storage: Storage = "int8",
        glu: bool = False,
        heads: int | None = None,
        top_k: int | None = None,
        sparse_gradients: bool = False,
    ) -> None:
        super().__init__()
        if n_experts < 1:
            raise ValueError(f"n_experts={n_experts}, allowed: at least 1")
        moment = find(activation).second_moment
        self.n_experts, self.activation, self.storage = n_experts, activation, storage
        self.sparse_gradients = sparse_gradients
        out_std = output_rows_std(d_model, n_experts, moment, heads, top_k, "softmax", OUTPUT_STD)
        for name in ("up", "down", *(("gate",) if glu else ())):
            table = nn.init.normal_(new_table(n_experts, d_model), std=out_std if name == "down" else d_model**-0.5)
            self._keep(name, quantize_rows(table, storage))

    def _keep(self, name: str, table: QuantizedTable) -> None:
        codes = table.codes if self.storage == "int8" else table.codes.view(torch.uint8)
        self.register_buffer(f"{name}_codes", codes)
        self.register_buffer(f"{name}_scale", table.scale)

    def table(self, name: str) -> QuantizedTable | None:
        """The table `up`, `down` or `gate`; None where there is no such table."""
        if f"{name}_codes" not in self._buffers:
            return None
        codes, scale = self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scale")
        return QuantizedTable(self._numbers(codes), scale.float(), pending_factors(codes))

    def _numbers(self, codes: Tensor) -> Tensor:
        return codes if self.storage == "int8" else codes.view(torch.float8_e4m3fn)

    def row_parameters(self) -> tuple[Tensor, ...]:
        return tuple(self.stored()) if self.sparse_gradients else ()

    def stored(self) -> dict[Tensor, QuantizedTable]:
        """Each buffer of codes, and its table, whose rows can be replaced."""
        names = {name: self.get_buffer(f"{name}_codes") for name in self.tables()}
        return {
            codes: QuantizedTable(self._numbers(codes), self.get_buffer(f"{name}_scale"))
            for name, codes in names.items()
        }

    def tables(self) -> dict[str, QuantizedTable]:
        """All tables by name."""
        named = {name: self.table(name) for name in ("gate", "up", "down")}
        return {name: table for name, table in named.items() if table is not None}

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        expert = self.expert_of_rows(offsets, len(z))
        rows = {name: table.rows(expert, z.dtype) for name, table in self.tables().items()}
        return one_neuron_each(z, rows, self.activation)

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        if not isinstance(routing, SparseRouting) or routing.fixed is None:
            if self.sparse_gradients and self.training:
                raise ValueError("tables in 8 bits learn from tokens that meet equally many experts each, these do not")
            return super().forward(x, routing)
        ids, weight = routing.matrix()
        tables = self.tables()
        return quantized_singletons(x, ids, weight, tables["up"], tables["down"], self.activation, tables.get("gate"))

    def kept_per_token(self, rows_per_token: float, d_model: int) -> Kept:
        """Products with the rows of `up` (and `gate`), each activation and product after them; no row is kept."""
        return Kept(bytes=4.0 * rows_per_token * (2 * len(self.tables()) - 1))

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """As in `SingletonBank`: a fresh expert (-1) gets normal rows of the table's standard deviation."""
        for name, (codes, scale, _) in self.tables().items():
            source = index.clamp(min=0)
            codes, scale = codes[source], scale[source]
            fresh = (index < 0).nonzero()[:, 0]
            if len(fresh):
                std = torch.linalg.vector_norm(codes.float() * scale[:, None]) * codes.numel() ** -0.5
                rows = quantize_rows(torch.randn(len(fresh), codes.shape[1], device=codes.device) * std, self.storage)
                codes[fresh], scale[fresh] = rows.codes, rows.scale
            self._keep(name, QuantizedTable(codes, scale))
        self.n_experts = len(index)

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        """None: they are not parameters."""
        return ()

    def row_flops(self) -> float:
        return 2.0 * len(self.tables()) * self.tables()["up"].codes.shape[1]

    def row_widths(self) -> float:
        return 1.0


def quantized(bank: SingletonBank, storage: str = "int8") -> QuantizedBank:
    """A trained bank in 8 bits, fixed; the bank itself stays as it is.

    Raises: ValueError for an unknown storage.
    """
    n_experts, d_model = bank.up.shape
    # one row for now: its tables are replaced
    made = QuantizedBank(d_model, 1, bank.activation, glu=isinstance(bank, GLUSingletonBank))
    made.storage = storage
    for name, table in bank.tables().items():
        made._keep(name, quantize_rows(table, storage))
    made.n_experts = n_experts
    return made.train(bank.training)


def quantize_banks(model: nn.Module, storage: str = "int8") -> list[str]:
    """Put a `QuantizedBank` in the place of every `SingletonBank` in a model, one for a bank that stands in several;
    returns their names.

    Raises: ValueError where the model has none, or for an unknown storage.
    """
    found = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    banks = {name: module for name, module in found if isinstance(module, SingletonBank)}
    if not banks:
        raise ValueError(f"{type(model).__name__} has no bank of one-neuron experts, the only ones kept in 8 bits")
    made = {id(bank): quantized(bank, storage) for bank in banks.values()}
    for name, bank in banks.items():
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent).register_module(own, made[id(bank)])
    return list(banks)
