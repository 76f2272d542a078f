"""Our own models: experts of unequal widths, each read from its rows of the run's checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moestro.experts.ffn import FFNBank
from moestro.experts.linears import ConcatLinear
from moestro.formats.shards import DTYPES, Entry, header
from moestro.offload.blobs import Experts, Extent, Stored, laid_out
from moestro.offload.calibration import Calibration
from moestro.offload.codecs import Plain
from moestro.offload.files import OffloadError
from moestro.offload.predictor import Chosen
from moestro.ops import expert_ffn
from moestro.routing import Routing, SparseRouting
from moestro.train import newest_checkpoint
from moestro.train.checkpoint import added_tensors, read_state


class OwnHost:
    """The newest checkpoint of a run whose mixtures have one `FFNBank` each (HMoE, MoE, ...) and choose a fixed number
    of experts a token; other banks stay in memory. Every expert is a blob of its own width: the narrow are cheap to
    bring, without any lower precision.

    Computed by the same operation as in memory, expert by expert: equal up to the order in which experts are added.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path, self.checkpoint = Path(folder), newest_checkpoint(Path(folder))
        state = read_state(self.checkpoint)
        self.tied: dict[str, str] = state["tied"]
        self.file = self.checkpoint / "model.safetensors"
        self.entries, _ = header(self.file)
        decoder: Any = self._decoder_on_meta()
        self.banks = _banks(decoder)
        if not self.banks:
            raise OffloadError(f"{self.path}: no mixture of this run has a bank of feed-forward experts to offload")
        self.experts: Experts = [_experts(self.file, self.entries, name, bank) for name, bank in self.banks.items()]
        self.layers, self.compute = tuple(range(len(self.banks))), compute_ffn
        self.top_k = max(round(layer.router.rows_per_token()) for layer in decoder.moe_layers().values())

    def _decoder_on_meta(self) -> torch.nn.Module:
        from moestro.recipe.build import build_model
        from moestro.recipe.load import load_recipe

        self.recipe = load_recipe(self.path / "recipe.yaml")
        self.vocab_size = self.entries["embedding.weight"].shape[0]
        return build_model(self.recipe, self.vocab_size, "meta")

    def load(self, device: torch.device) -> Any:
        from moestro.export.modeling import MoestroForCausalLM
        from moestro.export.opening import configured

        with _weightless(), device:
            model = MoestroForCausalLM(configured(self.recipe, self.vocab_size))
        kept = {name: entry for name, entry in self.entries.items() if not self._experts_own(name)}
        with safe_open(self.file, framework="pt", device=str(device)) as stored:
            tensors = {name: stored.get_tensor(name).clone() for name in kept}
        added = added_tensors(self.checkpoint, {name: tuple(entry.shape) for name, entry in self.entries.items()})
        tensors |= {name: tensor.to(device) for name, tensor in added.items()}
        tensors |= {name: tensors[source] for name, source in self.tied.items() if source in tensors}
        found = model.decoder.load_state_dict(tensors, strict=False)
        if found.unexpected_keys or [name for name in found.missing_keys if not self._experts_own(name)]:
            raise OffloadError(f"{self.file} is of another model than {self.path / 'recipe.yaml'}: {found}")
        return model.eval()

    def _experts_own(self, name: str) -> bool:
        return any(name.startswith(f"{bank}.") for bank in self.banks)

    def predictor(self, model: Any, device: torch.device) -> "RouterPredictor":
        layers = model.decoder.moe_layers()
        routers = [layers[name.rsplit(".branches.", 1)[0]].router for name in self.banks]
        if any(router.follows for router in routers):
            raise OffloadError("routers that follow the layer before cannot be asked ahead of time: prefetch 0")
        return RouterPredictor(routers)

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
        from moestro.export.tokenizers import fast_tokenizer

        return fast_tokenizer(self.path / "tokenizer", self.recipe.data.value("seq_len"))


class RouterPredictor:
    """Routers of the next layers, each asked by itself with this layer's input."""

    size = 0

    def __init__(self, routers: Sequence[Any]) -> None:
        self.routers = routers

    def ahead(self, layer: int, hidden: Tensor, depth: int) -> list[Chosen]:
        """As `StackedGates`."""
        return [chosen(router(hidden)) for router in self.routers[layer + 1 : layer + 1 + depth]]


def chosen(routing: Routing) -> Chosen:
    """Ids and weights [t, k] of a routing.

    Raises: OffloadError where tokens differ in the number of their experts.
    """
    if not isinstance(routing, SparseRouting) or routing.fixed is None:
        raise OffloadError("offloading needs a fixed number of experts a token (top_k)")
    return routing.matrix()


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


def _forward(index: int, bank: FFNBank, fn: Any) -> Any:
    def forward(x: Tensor, routing: Routing) -> Tensor:
        return fn(index, bank, x, *chosen(routing))

    return forward


@contextmanager
def _weightless() -> Iterator[None]:
    """Inside, matrices of banks are made without memory."""
    before = ConcatLinear._fresh
    ConcatLinear._fresh = lambda self, widths: torch.empty(self.blocks * sum(widths), self.d_model, device="meta")
    try:
        yield
    finally:
        ConcatLinear._fresh = before


def _experts(file: Path, entries: dict[str, Entry], name: str, bank: FFNBank) -> list[Stored]:
    stored = []
    for expert in range(bank.n_experts):
        ranges = {
            part: (entries[f"{name}.{part}.weight"], getattr(bank, part).rows_of(expert)) for part in ("w_in", "w_out")
        }
        shapes = {part: (rows.stop - rows.start, entry.shape[1]) for part, (entry, rows) in ranges.items()}
        blob = laid_out(shapes, DTYPES[ranges["w_in"][0].dtype], Plain())
        extents = []
        for part in blob.parts:
            entry, rows = ranges[part.name]
            each = entry.shape[1] * blob.dtype.itemsize
            start = entry.start + rows.start * each
            extents.append(Extent(file, start, part.fields[0].size, part.fields[0].offset))
        stored.append(Stored(blob, tuple(extents)))
    return stored
