"""Whose experts are kept away from memory: stock models, and our own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.formats import Checkpoint, Fused
from moestro.offload.blobs import Experts
from moestro.offload.calibration import Calibration
from moestro.offload.files import OffloadError
from moestro.offload.folders import experts_in
from moestro.offload.own_folders import own_folder
from moestro.offload.predictor import Predictor, StackedGates, gates_of
from moestro.offload.rows import Tables

# experts module with one expert's tensors, rows [n d], ids of the expert [n 1] (0), their weights [n 1] -> rows [n d]
Compute = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
# layer, experts module, hidden [t d], ids [t k], weights [t k] -> [t d]
Experting = Callable[[int, Any, Tensor, Tensor, Tensor], Tensor]


class Host(Protocol):
    """A model in a folder: its experts as files hold them, its banks of rows by name, and everything else."""

    path: Path
    experts: Experts
    layers: tuple[int, ...]
    top_k: int
    compute: Compute

    @property
    def tables(self) -> Mapping[str, Tables]: ...

    @property
    def standing(self) -> bool:
        """Whether `compute` multiplies by matrices as they are stored (`F.linear` alone)."""
        ...

    def load(self, device: torch.device) -> Any:
        """The model without its experts' tensors."""
        ...

    @property
    def predictable(self) -> bool:
        """Whether routers can be asked before their layer is reached."""
        ...

    def predictor(self, model: Any, device: torch.device) -> Predictor:
        """Asks the routers of the layers ahead.

        Raises: OffloadError where they cannot be.
        """
        ...

    def calibration(self) -> Calibration:
        """What measures the inputs of this model's matrices."""
        ...

    def running(self, model: Any, fn: Experting) -> AbstractContextManager[None]:
        """Inside, `fn` computes the experts."""
        ...

    def tokenizer(self) -> Any: ...


class StockHost:
    """A folder of the Hugging Face format, of a family that `moestro.formats` knows.

    Raises: OffloadError where its experts are quantised; FormatError for a folder that is none.
    """

    predictable = True

    def __init__(self, folder: str | Path) -> None:
        from moestro.hf.experts import eager_experts

        self.checkpoint = Checkpoint(folder)
        if "quantization_config" in self.checkpoint.config:
            raise OffloadError(
                f"the experts of {folder} are quantised already: allowed: folders of float32, bfloat16 or float16, of "
                "which copies in few bits are made here"
            )
        self.path, self.compute = self.checkpoint.path, eager_experts
        self.experts, self.layers = experts_in(self.checkpoint), self.checkpoint.moe_layers
        self.top_k, self.tables = self.checkpoint.top_k, {}

    @property
    def standing(self) -> bool:
        experts = self.checkpoint.family.experts
        return not (isinstance(experts, Fused) and experts.transposed)

    def load(self, device: torch.device) -> Any:
        from moestro.hf.expertless import load_without_experts

        return load_without_experts(self.path, device)

    def predictor(self, model: Any, device: torch.device) -> StackedGates:
        return StackedGates(gates_of(self.checkpoint), device)

    def calibration(self) -> Calibration:
        experts = self.checkpoint.family.experts
        transposed = isinstance(experts, Fused) and experts.transposed
        return Calibration(None, None) if transposed else Calibration(hidden=_hidden_units)

    @contextmanager
    def running(self, model: Any, fn: Experting) -> Iterator[None]:
        from moestro.hf.experts import intercepted

        with intercepted(model, fn):
            yield

    def tokenizer(self) -> Any:
        from moestro.hf.expertless import tokenizer_in

        return tokenizer_in(self.path)


def _hidden_units(module: Any, rows: Tensor) -> Tensor:
    bias = module.gate_up_proj_bias[0] if module.has_bias else None
    return module._apply_gate(F.linear(rows, module.gate_up_proj[0], bias))


def host_of(folder: str | Path) -> Host:
    """The model in a folder: a run of ours, its export, or a stock one.

    Raises: FormatError for a folder that is none of them; others as the hosts say.
    """
    if (own := own_folder(Path(folder))) is not None:
        from moestro.offload.own import OwnHost

        return OwnHost(own)
    return StockHost(folder)
