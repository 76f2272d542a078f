"""Experts' matrices of the compressed folder in 8 or 4 bits: what is written in place of each."""

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from moestro.compress.plan import LayerPlan, Plan, PlanError, Quantisation
from moestro.compress.quantised import SCHEMES, quantised
from moestro.formats import Checkpoint, PerExpert
from moestro.formats.shards import DTYPES
from moestro.formats.writer import Outgoing, computed, of_tensor

WEIGHT = "weight"


def require_storable(how: Quantisation, checkpoint: Checkpoint) -> None:
    """Raises: PlanError where the experts of this folder cannot be stored so; reads no tensor."""
    if not isinstance(checkpoint.family.experts, PerExpert):
        raise PlanError(
            f"quantise: {checkpoint.family.model_type} keeps the experts of a layer in one tensor on disk: of such "
            "tensors transformers restores no compressed-tensors (it does so while it joins the matrices of single "
            "experts), so the folder would load without its experts: allowed: families with a tensor for every expert"
        )
    if "quantization_config" in checkpoint.config:
        raise PlanError(f"quantise: the experts of {checkpoint.path} are quantised already")
    for layer in checkpoint.moe_layers:
        inputs = (checkpoint.shape(checkpoint.router_tensors(layer)["weight"])[1], checkpoint.width(layer))
        if how.group_size and any(size % how.group_size for size in inputs):
            raise PlanError(
                f"group_size={how.group_size}, allowed: 0, or a divisor of the {inputs[0]} and {inputs[1]} inputs of "
                f"experts' matrices (layer {layer})"
            )


class Storing:
    """What stands for an expert's matrix under `plan.quantise`. `tensors` are the plan's own, with moments by name.

    Raises: PlanError where the folder keeps the experts of a layer in one tensor, which the format does not store.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, tensors: dict[str, Tensor]) -> None:
        self.plan, self.tensors = plan, tensors
        if plan.quantise is not None:
            require_storable(plan.quantise, checkpoint)
        # the parts of one matrix may be written one after the other
        self.made = lru_cache(maxsize=1)(self._made)

    def stored(self, whole: Outgoing, layer: LayerPlan, old: int, part: str) -> Iterator[Outgoing]:
        """The tensors that stand for `whole`, one of the matrices of old expert `old`: itself where nothing is
        quantised."""
        how = self.plan.quantise
        if how is None:
            yield whole
            return
        rows, columns = whole.shape
        bits, kind, _ = SCHEMES[how.scheme]
        stem, dtype = whole.name.removesuffix(WEIGHT), DTYPES[whole.dtype]
        groups = columns // how.group_size if how.group_size else 1
        pick = partial(self._part, whole, layer.layer, old, "hidden" if part == "down" else "input")
        yield computed(f"{stem}weight_scale", dtype, (rows, groups), partial(pick, "weight_scale"))
        if kind == "float":
            yield computed(whole.name, torch.float8_e4m3fn, whole.shape, partial(pick, WEIGHT))
            return
        packed = (rows, -(-columns * bits // 32))
        yield computed(f"{stem}weight_packed", torch.int32, packed, partial(pick, "weight_packed"))
        yield of_tensor(f"{stem}weight_shape", torch.tensor(whole.shape))

    def _part(self, whole: Outgoing, layer: int, old: int, side: str, name: str) -> Tensor:
        return self.made(whole, f"moments.{layer}.{old}.{side}")[name]

    def _made(self, whole: Outgoing, moments: str) -> dict[str, Tensor]:
        how = self.plan.quantise
        if how is None:
            raise PlanError(f"{whole.name} is not quantised")
        if how.calibrated and moments not in self.tensors:
            raise PlanError(f"quantise: calibrated, but the plan's tensors have no {moments}")
        data = bytearray(b"".join(bytes(piece) for piece in whole.pieces()))
        matrix = torch.frombuffer(data, dtype=DTYPES[whole.dtype]).view(whole.shape)
        try:
            return quantised(matrix, how, self.tensors[moments] if how.calibrated else None)
        except ValueError as error:
            raise PlanError(f"quantise: {whole.name}: {error}") from error
