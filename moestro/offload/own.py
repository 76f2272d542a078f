"""Our own models: experts of unequal widths, and rows of tables, each read from its rows of the checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moestro.experts import SingletonBank, ValueBank, tables
from moestro.experts.ffn import FFNBank
from moestro.experts.linears import ConcatLinear
from moestro.experts.tables import TableBank
from moestro.formats.shards import DTYPES
from moestro.offload.blobs import Experts, Extent, Stored, laid_out
from moestro.offload.calibration import Calibration
from moestro.offload.chosen import Chosen, chosen
from moestro.offload.codecs import Plain
from moestro.offload.files import OffloadError
from moestro.offload.own_folders import OwnFolder
from moestro.offload.rows import Table
from moestro.ops import expert_ffn
from moestro.routing import Routing


class OwnHost:
    """The newest checkpoint of a run, or its export in our own layout. Of mixtures with one `FFNBank` (HMoE, MoE, ...)
    every expert is a blob of its own width: the narrow are cheap to bring, without any lower precision. Of banks of
    rows (PEER's neurons, a memory's values) every row is one. Other banks stay in memory.

    Computed by the same operation as in memory: rows to the last bit, feed-forward experts one by one, equal up to the
    order in which they are added.
    """

    # w_out is kept transposed
    standing = False

    def __init__(self, folder: OwnFolder) -> None:
        self.folder, self.path = folder, folder.path
        decoder: Any = self._built(torch.device("meta")).decoder
        self.banks = _banks(decoder)
        self.tables = {name: self._tables(name, bank) for name, bank in _row_banks(decoder).items()}
        if not self.banks and not self.tables:
            raise OffloadError(f"{self.path}: no mixture of this model has a bank of experts that can be offloaded")
        self.experts: Experts = [_experts(folder, name, bank) for name, bank in self.banks.items()]
        self.layers, self.compute = tuple(range(len(self.banks))), compute_ffn
        layers = decoder.moe_layers()
        self.top_k = max(round(layer.router.rows_per_token()) for layer in layers.values())
        self.predictable = not any(layers[_layer(name)].follows for name in self.banks)

    def _built(self, device: torch.device) -> Any:
        from moestro.export.modeling import MoestroForCausalLM

        with device:
            return MoestroForCausalLM(self.folder.config)

    def _tables(self, name: str, bank: TableBank) -> dict[str, Table]:
        found = {}
        for table in bank.tables():
            entry = self.folder.entries[f"{name}.{table}"]
            rows, width = entry.shape
            file, stored = self.folder.file_of(f"{name}.{table}"), DTYPES[entry.dtype]
            found[table] = Table(file, entry.start, rows, width, stored, self.folder.dtype)
        return found

    def load(self, device: torch.device) -> Any:
        from moestro.export.opening import in_dtype

        with _weightless():
            model: Any = in_dtype(self._built(device), self.folder.dtype)
        for name, parameter in list(model.decoder.named_parameters()):
            if parameter.is_meta and not self._experts_own(name):
                owner, _, own = name.rpartition(".")
                setattr(
                    model.decoder.get_submodule(owner), own, nn.Parameter(torch.empty_like(parameter, device=device))
                )
        tensors = {name: self.folder.read(name) for name in self.folder.entries if not self._experts_own(name)}
        tensors |= self.folder.added(model.decoder.state_dict().keys())
        tensors |= {name: tensors[source] for name, source in self.folder.tied.items() if source in tensors}
        found = model.decoder.load_state_dict(tensors, strict=False)
        if found.unexpected_keys or [name for name in found.missing_keys if not self._experts_own(name)]:
            raise OffloadError(f"{self.path} holds the tensors of another model than it describes: {found}")
        for layer in model.decoder.moe_layers().values():
            # outputs of single experts are kept for training's losses, past `forward`, with weights that are not here
            layer.record = None
        return model.eval()

    def _experts_own(self, name: str) -> bool:
        name = self.folder.tied.get(name, name)
        return any(name.startswith(f"{bank}.") for bank in (*self.banks, *self.tables))

    def predictor(self, model: Any, device: torch.device) -> "RouterPredictor":
        if not self.predictable:
            raise OffloadError("routers that follow the layer before cannot be asked ahead of time: prefetch 0")
        layers = model.decoder.moe_layers()
        return RouterPredictor([layers[_layer(name)].router for name in self.banks])

    def calibration(self) -> Calibration:
        # w_out is kept transposed: its columns are outputs
        return Calibration("w_in", None)

    @contextmanager
    def running(self, model: Any, fn: Any) -> Iterator[None]:
        with ExitStack() as undo:
            for index, name in enumerate(self.banks):
                bank = model.decoder.get_submodule(name)
                bank.forward = _forward(index, bank, fn)
                undo.callback(delattr, bank, "forward")
            yield

    def tokenizer(self) -> Any:
        return self.folder.tokenizer()


class RouterPredictor:
    """Routers of the next layers, each asked by itself with this layer's input."""

    size = 0

    def __init__(self, routers: Sequence[Any]) -> None:
        self.routers = routers

    def ahead(self, layer: int, hidden: Tensor, depth: int) -> list[Chosen]:
        """As `StackedGates`."""
        return [chosen(router(hidden)) for router in self.routers[layer + 1 : layer + 1 + depth]]


def compute_ffn(module: Any, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One expert on its rows, times their weights."""
    w_in, w_out = module.w_in[0], module.w_out[0]
    token = torch.arange(len(rows), device=rows.device)
    bounds = torch.tensor([0, len(rows)], device=rows.device)
    return expert_ffn(rows, token, weights[:, 0], bounds, w_in, w_out, [len(w_out)], module.activation)


def _banks(decoder: Any) -> dict[str, FFNBank]:
    found = {}
    for name, layer in decoder.moe_layers().items():
        banks = {f"{name}.branches.{i}": b for i, b in enumerate(layer.branches) if isinstance(b, FFNBank)}
        if len(banks) == 1:
            found |= banks
    return found


def _layer(bank: str) -> str:
    """The name of a bank's layer."""
    return bank.rsplit(".branches.", 1)[0]


def _row_banks(decoder: Any) -> dict[str, TableBank]:
    """Banks of which every expert is one row of each table; one that several layers share stands once."""
    kinds = (SingletonBank, ValueBank)
    return {name: module for name, module in decoder.named_modules() if isinstance(module, kinds)}


def _forward(index: int, bank: FFNBank, fn: Any) -> Any:
    def forward(x: Tensor, routing: Routing) -> Tensor:
        return fn(index, bank, x, *chosen(routing))

    return forward


@contextmanager
def _weightless() -> Iterator[None]:
    """Inside, matrices and tables of banks are made without memory."""
    before, table = ConcatLinear._fresh, tables.new_table
    ConcatLinear._fresh = lambda self, widths: torch.empty(self.blocks * sum(widths), self.d_model, device="meta")
    tables.new_table = lambda rows, width, *_: torch.empty(rows, width, device="meta")
    try:
        yield
    finally:
        ConcatLinear._fresh, tables.new_table = before, table


def _experts(folder: OwnFolder, name: str, bank: FFNBank) -> list[Stored]:
    stored = []
    for expert in range(bank.n_experts):
        ranges = {}
        for part in ("w_in", "w_out"):
            tensor = f"{name}.{part}.weight"
            ranges[part] = folder.file_of(tensor), folder.entries[tensor], getattr(bank, part).rows_of(expert)
        shapes = {part: (rows.stop - rows.start, entry.shape[1]) for part, (_, entry, rows) in ranges.items()}
        blob = laid_out(shapes, DTYPES[ranges["w_in"][1].dtype], Plain())
        extents = []
        for part in blob.parts:
            file, entry, rows = ranges[part.name]
            each = entry.shape[1] * blob.dtype.itemsize
            start = entry.start + rows.start * each
            extents.append(Extent(file, start, part.fields[0].size, part.fields[0].offset))
        stored.append(Stored(blob, tuple(extents)))
    return stored
