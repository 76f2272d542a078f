"""Every tensor of the compressed folder: its name there, and where its bytes come from."""

from collections.abc import Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from moestro.compress.experts import NewExperts
from moestro.compress.feasible import Layout, limits_of, one_tensor
from moestro.compress.plan import LayerPlan, Plan, PlanError
from moestro.compress.slots import Slots, slots_of
from moestro.compress.storing import Storing
from moestro.formats import Checkpoint, Fused, PerExpert
from moestro.formats.shards import Entry
from moestro.formats.writer import Outgoing, computed, of_file, of_tensor, tensor_pieces

# What selects a dead expert is lowered by this, far below what any score reaches.
NEVER = -1e4
BIASES = ("bias", "correction")


class Rewriting:
    """What of a folder's tensors goes where. Nothing is read before it is written but routers; a plan's own `tensors`
    (by name) stand in place of what would be written.

    Raises: PlanError where the plan asks for what this folder's tensors do not allow.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        layout: Layout,
        densify: bool = False,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        self.checkpoint, self.plan, self.family = checkpoint, plan, checkpoint.family
        self.tensors = dict(tensors or {})
        self.experts = NewExperts(checkpoint, densify, self.tensors)
        self.storing = Storing(checkpoint, plan, self.tensors)
        self.slots = slots_of(plan, limits_of(checkpoint), layout)
        self.unequal = {
            layer.layer for layer in plan.layers if layout == "custom" and is_unequal(layer, densify)
        }  # fmt: skip
        self._check()

    def _check(self) -> None:
        changing = [layer for layer in self.plan.layers if layer.merges or layer.factors or layer.narrows]
        if changing and "quantization_config" in self.checkpoint.config:
            raise PlanError(
                f"layer {changing[0].layer}: the experts of {self.checkpoint.path} are quantised; they can be dropped, "
                "not merged, narrowed or factored"
            )
        if "quantization_config" in self.checkpoint.config and any(slots.dead for slots in self.slots.values()):
            raise PlanError(f"the experts of {self.checkpoint.path} are quantised: dead ones cannot be added (padded)")
        if self.plan.quantise is not None and (self.unequal or any(slots.dead for slots in self.slots.values())):
            raise PlanError("quantise: factors, unequal widths and dead experts are not stored so: allowed: densify")
        if self.unequal and isinstance(self.family.experts, Fused):
            raise PlanError(
                f"layer {min(self.unequal)}: {one_tensor(self.checkpoint)}, which holds no factors "
                "and no unequal widths: allowed: densify, and equal widths"
            )

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """Layers beyond the decoder (multi-token prediction) that the plan does not have, and that go as a whole."""
        if self.plan.identical:
            return ()
        return tuple(layer for layer in self.checkpoint.extra_layers if self.plan.of(layer) is None)

    def files(self) -> dict[str, list[Outgoing]]:
        """The tensors of every file that is left with any, by the file of the source in which they were."""
        found: dict[str, list[Outgoing]] = {}
        for name in self.checkpoint.names():
            for outgoing in self._written_for(name):
                file = self.checkpoint.file_of(name)
                found.setdefault(file, []).append(self._healed(outgoing))
        return found

    def _healed(self, outgoing: Outgoing) -> Outgoing:
        if outgoing.name not in self.tensors:
            return outgoing
        healed = of_tensor(outgoing.name, self.tensors[outgoing.name])
        if (healed.dtype, healed.shape) != (outgoing.dtype, outgoing.shape):
            raise PlanError(
                f"tensors: {outgoing.name} is {healed.dtype} {healed.shape}, expected {outgoing.dtype} {outgoing.shape}"
            )
        return healed

    def _written_for(self, name: str) -> Iterator[Outgoing]:
        """What one tensor of the source becomes."""
        if any(name.startswith(f"model.layers.{layer}.") for layer in self.dropped_layers):
            return
        if (member := self.member(name)) is not None:
            yield from self._expert(name, *member)
        elif name in self.rows:
            yield from self._rows(name, *self.rows[name])
        else:
            yield of_file(name, self.checkpoint.path, self._entry(name))

    def _entry(self, name: str) -> Entry:
        return self.checkpoint.shards[name]

    def member(self, name: str) -> tuple[LayerPlan, int] | None:
        """The layer and the old expert whose tensor this is; None for tensors of no expert, or of no planned layer."""
        if not isinstance(self.family.experts, PerExpert):
            return None
        found = self.family.experts.member.match(name)
        layer = found and self.plan.of(int(found["layer"]))
        return (layer, int(found["expert"])) if found and layer else None

    def _expert(self, name: str, layer: LayerPlan, old: int) -> Iterator[Outgoing]:
        slots = self.slots[layer.layer]
        if old not in layer.keep:
            return
        new = layer.keep.index(old)
        part = self.parts(layer, old).get(name)
        if part is not None and layer.layer in self.unequal:
            yield from self._unequal(name, layer, new, part)
        elif part is not None:
            new_name = self.renumbered(name, slots.of(new))
            changes = self.experts.changes(layer, new)
            whole = self._made(new_name, name, layer, new, part) if changes else self._as_it_is(new_name, name)
            yield from self.storing.stored(whole, layer, old, part)
        else:
            yield self._as_it_is(self.renumbered(name, slots.of(new)), name)
        if new == 0 and part is not None:
            yield from (self._dead(self.renumbered(name, slot), name, layer, part) for slot in slots.dead)

    def _as_it_is(self, new_name: str, name: str) -> Outgoing:
        return of_file(new_name, self.checkpoint.path, self._entry(name))

    def renumbered(self, name: str, expert: int) -> str:
        """An expert's tensor under another number."""
        found = self.family.experts.member.match(name)  # type: ignore[union-attr]
        return name if found is None else f"{name[: found.start('expert')]}{expert}{name[found.end('expert') :]}"

    def parts(self, layer: LayerPlan, old: int) -> dict[str, str]:
        """{name: "gate", "up" or "down"} of one expert's matrices."""
        located = self.family.experts.locate(layer.layer, old, self.checkpoint.width(layer.layer))
        return {stored.name: part for part, stored in located.items()}

    def _shape(self, layer: LayerPlan, width: int, part: str) -> tuple[int, int]:
        d_model = self.checkpoint.shape(self.family.router.format(layer=layer.layer))[1]
        return (d_model, width) if part == "down" else (width, d_model)

    def _made(self, new_name: str, name: str, layer: LayerPlan, new: int, part: str) -> Outgoing:
        shape = self._shape(layer, self.experts.width(layer, new), part)
        return computed(new_name, self.checkpoint.dtype(name), shape, partial(self.experts.part, layer, new, part))

    def _dead(self, new_name: str, name: str, layer: LayerPlan, part: str) -> Outgoing:
        dtype, shape = self.checkpoint.dtype(name), self._shape(layer, self.checkpoint.width(layer.layer), part)
        return computed(new_name, dtype, shape, lambda: torch.zeros(shape, dtype=dtype))

    def _unequal(self, name: str, layer: LayerPlan, new: int, part: str) -> Iterator[Outgoing]:
        stem = f"{name[: self.family.experts.member.match(name).start('expert')]}unequal.{new}.{part}"  # type: ignore
        rank = self.experts.rank(layer, new)
        if rank is None or self.experts.densify:
            yield self._made(stem, name, layer, new, part)
            return
        rows, columns = self._shape(layer, self.experts.width(layer, new), part)
        for i, shape in enumerate([(rows, rank), (rank, columns)]):
            pick = partial(lambda place: self.experts.factors(layer, new, part)[place], i)
            yield computed(f"{stem}_{'ab'[i]}", self.checkpoint.dtype(name), shape, pick)

    @cached_property
    def rows(self) -> dict[str, tuple[LayerPlan, str]]:
        """{name: layer, role} of the tensors with a row for every expert: the router's, and those of fused experts."""
        found = {}
        for layer in self.plan.layers:
            routers = self.checkpoint.router_tensors(layer.layer)
            found |= {name: (layer, role) for role, name in routers.items()}
            if isinstance(self.family.experts, Fused):
                found |= dict.fromkeys(self.family.experts.tensors(layer.layer), (layer, "experts"))
        return found

    def _rows(self, name: str, layer: LayerPlan, role: str) -> Iterator[Outgoing]:
        entry, slots = self._entry(name), self.slots[layer.layer]
        if role == "experts":
            yield self._fused(name, entry, layer, slots)
        elif self.plan.semantics != "slice":
            yield of_file(name, self.checkpoint.path, entry)
        elif slots.dead or (layer.merges and self.plan.merged_rows == "mean"):
            yield of_tensor(name, self._router_rows(name, layer, slots, NEVER if role in BIASES else 0.0))
        else:
            yield of_file(name, self.checkpoint.path, entry, layer.keep)

    def _router_rows(self, name: str, layer: LayerPlan, slots: Slots, dead: float) -> Tensor:
        old = self.checkpoint.read(name)
        rows = old.new_full((slots.count, *old.shape[1:]), dead)
        for new, kept in enumerate(layer.keep):
            group = layer.groups[new] if layer.groups and self.plan.merged_rows == "mean" else None
            members, weights = ([kept], [1.0]) if group is None else (list(group.members), group.weights)
            share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
            rows[slots.of(new)] = torch.tensordot(share, old[members].double(), 1).to(old.dtype)
        return rows

    def _fused(self, name: str, entry: Entry, layer: LayerPlan, slots: Slots) -> Outgoing:
        if not (slots.dead or any(self.experts.changes(layer, new) for new in range(layer.n_kept))):
            return of_file(name, self.checkpoint.path, entry, layer.keep)
        shape, dtype = self._fused_shape(name, layer), self.checkpoint.dtype(name)

        def pieces() -> Iterator[memoryview]:
            for new in slots.order:
                yield from tensor_pieces(
                    torch.zeros(shape, dtype=dtype) if new is None else self._fused_entry(name, layer, new)
                )

        size = slots.count * torch.zeros(shape, dtype=dtype, device="meta").nbytes
        return Outgoing(name, entry.dtype, (slots.count, *shape), size, pieces)

    def _fused_shape(self, name: str, layer: LayerPlan) -> tuple[int, ...]:
        """Shape of one new expert's entry."""
        located = self.family.experts.locate(layer.layer, 0, self.experts.width(layer, 0))
        parts = {part: stored for part, stored in located.items() if stored.name == name}
        rows, columns = self._shape(layer, self.experts.width(layer, 0), next(iter(parts)).removesuffix("_bias"))
        if next(iter(parts)).endswith("_bias"):
            return (rows * len(parts),)
        whole = (rows * len(parts), columns)
        return whole[::-1] if next(iter(parts.values())).transposed else whole

    def _fused_entry(self, name: str, layer: LayerPlan, new: int) -> Tensor:
        """One new expert's entry of a fused tensor."""
        located = self.family.experts.locate(layer.layer, new, self.experts.width(layer, new))
        inside = {part: stored for part, stored in located.items() if stored.name == name}
        parts = {part: self.experts.part(layer, new, part) for part in inside}
        whole = next(iter(parts.values()))
        if set(inside) <= {"down", "down_bias"}:
            return whole.T.contiguous() if next(iter(inside.values())).transposed else whole
        return joined(self.family.experts, parts)  # type: ignore[arg-type]


def joined(experts: Fused, parts: dict[str, Tensor]) -> Tensor:
    """Gate and up as a family stores them in one."""
    first, second = parts.values()
    whole = torch.stack([first, second], 1).flatten(0, 1) if experts.interleaved else torch.cat([first, second])
    return whole.T.contiguous() if experts.transposed and whole.ndim == 2 else whole


def is_unequal(layer: LayerPlan, densify: bool = False) -> bool:
    """Whether the experts of a layer are of more than one shape, or products."""
    widths = {None if units is None else len(units) for units in layer.units or [None]}
    return len(widths) > 1 or (layer.factors and not densify)
