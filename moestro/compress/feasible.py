"""What routing still works after compression, and what a folder of each kind can say; asked before any measurement."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from moestro.compress.budget import share_of
from moestro.compress.plan import LayerPlan, Plan, PlanError, Semantics
from moestro.compress.source import RunSource, choice_of
from moestro.formats import Checkpoint, Fused
from moestro.formats.complete import stated
from moestro.routers.groups import EVERYWHERE

Layout = Literal["stock", "padded", "custom"]
FACTORS, SKIPPING = "low-rank factors (but multiplied out: --densify)", "skipping by gates"
NARROWER = "experts narrower than shared ones or layers without experts, which the same key of config.json sizes"


@dataclass(frozen=True)
class Output:
    """What is written: a folder of this kind. `densify` multiplies low-rank factors out again; `uniform` lets every
    layer keep as many experts as the plan's largest."""

    layout: Layout = "stock"
    densify: bool = False
    uniform: bool = False


STOCK = Output()


class InfeasibleError(PlanError):
    """What was asked for cannot be routed, or not be written in this kind of folder; the message lists what can."""


@dataclass(frozen=True)
class Limits:
    """What a router asks of its experts: `top_k` of them for a token, out of the best `topk_group` of `n_group` equal
    groups of consecutive experts, each of which is scored by its best `scored_by`. Groups of unequal `sizes` keep all
    of theirs."""

    top_k: int
    n_group: int = 1
    topk_group: int = 1
    scored_by: int = 1
    sizes: tuple[int, ...] = ()

    def group_of(self, expert: int, n_experts: int) -> int:
        """The routing group of an expert."""
        if self.sizes:
            return bisect_right([*accumulate(self.sizes)], expert)
        return expert // (n_experts // self.n_group)

    def per_group(self, layer: LayerPlan) -> list[int]:
        """Survivors of every routing group."""
        groups = [self.group_of(expert, layer.n_experts) for expert in layer.keep]
        return [groups.count(group) for group in range(self.n_group)]

    def n_kept(self, n_experts: int, ratio: float) -> int:
        """Experts that are left when this share of `n_experts` goes, equally from every routing group.

        Raises: InfeasibleError where routing would not work, with the ratios between which it was.
        """
        removed = share_of(ratio, n_experts)
        if self.sizes and removed:
            raise InfeasibleError(f"ratio={ratio}: {self._unequal()}, allowed: 0")
        if removed % self.n_group:
            below = removed // self.n_group * self.n_group
            near = [count / n_experts for count in (below, below + self.n_group) if count < n_experts]
            raise InfeasibleError(
                f"ratio={ratio} removes {removed} of {n_experts} experts, but {self.n_group} routing groups must lose "
                f"equally many: allowed near it: {', '.join(f'{value:g}' for value in near)}"
            )
        kept = n_experts - removed
        if (why := self.refusal(kept // self.n_group)) is not None:
            raise InfeasibleError(
                f"ratio={ratio} leaves {kept} of {n_experts} experts, {why}: allowed up to "
                f"{(n_experts - self.fewest) / n_experts:g}"
            )
        return kept

    @property
    def fewest(self) -> int:
        """The least number of experts, equal in all groups, with which every token finds its `top_k`."""
        return self.n_group * max(self.scored_by, -(-self.top_k // self.topk_group))

    def refusal(self, each: int) -> str | None:
        """Why `each` experts in every group are too few, None where they are not."""
        if each < self.scored_by:
            return f"{each} in a routing group that is scored by its best {self.scored_by}"
        if self.topk_group * each < self.top_k:
            among = f" of its best {self.topk_group} groups" if self.n_group > 1 else ""
            return f"fewer than the {self.top_k} experts that a token visits{among}"
        return None

    def check(self, layer: LayerPlan, equal: bool = True) -> None:
        """Raises: InfeasibleError where the survivors of a layer leave a token without experts, or where groups have
        different numbers of them and `equal` ones are needed."""
        counts = self.per_group(layer)
        if self.sizes:
            if counts != list(self.sizes):
                raise InfeasibleError(f"layer {layer.layer} keeps {counts} experts: {self._unequal()}")
            return
        if equal and len(set(counts)) > 1:
            raise InfeasibleError(
                f"layer {layer.layer} keeps {counts} experts of its {self.n_group} routing groups; a folder without "
                "padding would route by wrong groups: allowed: the same number from each"
            )
        if (why := self.refusal(min(counts))) is not None:
            raise InfeasibleError(f"layer {layer.layer} keeps {layer.n_kept} of {layer.n_experts} experts, {why}")

    def _unequal(self) -> str:
        return f"routing groups of unequal sizes {list(self.sizes)} lose no experts (method width makes them narrower)"


def limits_of(checkpoint: Checkpoint | RunSource) -> Limits:
    """What the routers of a folder ask for, by its config.json or, of a run, by the layers themselves: the most that
    any of them asks."""
    if isinstance(checkpoint, RunSource):
        chosen = [choice_of(layer) for _, layer in checkpoint.mixtures.values()]
        limited = [c.limit for c in chosen if getattr(c, "limit", EVERYWHERE).limits]
        most = max(getattr(c, "top_k", 1) for c in chosen)
        if not limited:
            return Limits(most)
        groups = limited[0]
        sizes = groups.sizes if len(set(groups.sizes)) > 1 else ()
        return Limits(most, groups.n_groups, groups.top_groups, groups.best, sizes)
    config, family = checkpoint.config, checkpoint.family
    groups = config.get("n_group") or 1
    by_one = family.correction is None
    limited = family.grouped and groups > 1 and (not by_one or config.get("topk_method") == "group_limited_greedy")
    if not limited:
        return Limits(checkpoint.top_k)
    return Limits(checkpoint.top_k, groups, stated(config, "topk_group", checkpoint.path), 1 if by_one else 2)


def pads_exactly(checkpoint: Checkpoint) -> bool:
    """Whether a dead expert can be given a bias with which it is never chosen."""
    return checkpoint.family.correction is not None or checkpoint.family.bias is not None


def check_request(checkpoint: Checkpoint | RunSource, layout: Layout, semantics: Semantics, per_layer: bool) -> None:
    """Raises: InfeasibleError where no plan of this kind could be written in a folder of kind `layout`."""
    if isinstance(checkpoint, RunSource):
        if semantics != "slice" or layout != "stock":
            raise InfeasibleError(f"a run keeps its own format and semantics 'slice', not {layout!r} and {semantics!r}")
        return
    if semantics != "slice" and layout != "custom":
        raise InfeasibleError(_cannot(layout, f"semantics {semantics!r}", checkpoint))
    if per_layer and layout == "stock":
        raise InfeasibleError(_cannot(layout, "a number of experts of its own for every layer", checkpoint))
    if layout == "padded" and not pads_exactly(checkpoint):
        raise InfeasibleError(_cannot(layout, "a dead expert that is never chosen", checkpoint))


@dataclass(frozen=True)
class Wanted:
    """What a method will do to the experts that stay, whatever the text says."""

    factors: bool = False
    merges: bool = False
    skips: bool = False
    whitens: bool = False
    quantises: bool = False
    narrows: bool = False


def check_method(checkpoint: Checkpoint | RunSource, output: Output, per_layer: bool, wanted: Wanted) -> None:
    """Raises: PlanError where no plan that does this could be applied to this source; InfeasibleError where such a
    folder cannot say it."""
    if isinstance(checkpoint, RunSource):
        if wanted.skips or wanted.whitens:
            raise PlanError(
                "skip and whiten are for Hugging Face folders: a run's experts are dropped, merged or thinned"
            )
        for block in checkpoint.mixtures if wanted.merges else ():
            widths = checkpoint.widths(block)
            if len({*widths}) > 1:
                raise PlanError(
                    f"block {block}: experts of widths {min(widths)} to {max(widths)}, allowed for merging: equal "
                    "widths; others can be dropped, narrowed or thinned"
                )
        return
    factors = wanted.factors and not output.densify
    if output.layout != "custom" and factors:
        raise InfeasibleError(_cannot(output.layout, FACTORS, checkpoint))
    if output.layout != "custom" and wanted.skips:
        raise InfeasibleError(_cannot(output.layout, SKIPPING, checkpoint))
    if output.layout != "custom" and wanted.narrows and checkpoint.family.width_of_all:
        raise InfeasibleError(_cannot(output.layout, NARROWER, checkpoint))
    if factors and isinstance(checkpoint.family.experts, Fused):
        raise PlanError(f"{one_tensor(checkpoint)}, which holds no factors: allowed: --densify")
    if wanted.quantises and (factors or (per_layer and output.layout == "padded")):
        raise PlanError("quantise: factors and dead experts are not stored so: allowed: --densify, no --format padded")
    if "quantization_config" in checkpoint.config and (wanted.factors or wanted.merges):
        raise PlanError(f"the experts of {checkpoint.path} are quantised; they can be dropped, not merged or factored")


def one_tensor(checkpoint: Checkpoint) -> str:
    """Words for what families do that do not store experts one by one."""
    return f"{checkpoint.family.model_type} keeps the experts of a layer in one tensor"


def check_plan(plan: Plan, checkpoint: Checkpoint, output: Output = STOCK) -> None:
    """Raises: PlanError where plan and checkpoint do not fit, InfeasibleError where routing would fail or such a folder
    cannot say what the plan does."""
    layout = output.layout
    _check_layers(plan, checkpoint)
    limits = limits_of(checkpoint)
    for layer in plan.layers:
        if plan.semantics == "slice":
            limits.check(layer, equal=layout != "padded")
    if plan.identical:
        return
    differ = len({layer.n_kept for layer in plan.layers}) > 1
    check_request(checkpoint, layout, plan.semantics, differ)
    if layout != "custom":
        for what, present in (
            (FACTORS, not output.densify and any(map(_factors, plan.layers))),
            ("experts of different widths", len(_widths(plan)) > 1),
            (SKIPPING, any(layer.skip_below is not None for layer in plan.layers)),
            (NARROWER, checkpoint.family.width_of_all and any(layer.narrows for layer in plan.layers)),
        ):
            if present:
                raise InfeasibleError(_cannot(layout, what, checkpoint))


def _check_layers(plan: Plan, checkpoint: Checkpoint) -> None:
    numbers = [layer.layer for layer in plan.layers if layer.layer in checkpoint.moe_layers]
    allowed = {*checkpoint.moe_layers, *checkpoint.extra_layers}
    if numbers != list(checkpoint.moe_layers) or any(layer.layer not in allowed for layer in plan.layers):
        raise PlanError(
            f"the plan has layers {[layer.layer for layer in plan.layers]}, {checkpoint.path} has experts in layers "
            f"{[*checkpoint.moe_layers, *checkpoint.extra_layers]} (layers)"
        )
    for layer in plan.layers:
        width, stored = checkpoint.width(layer.layer), checkpoint.n_experts(layer.layer)
        d_model = checkpoint.shape(checkpoint.router_tensors(layer.layer)["weight"])[1]
        if layer.n_experts != stored:
            raise PlanError(f"layer {layer.layer} has {stored} experts, n_experts={layer.n_experts} in the plan")
        for units in layer.units or ():
            if units is not None and units[-1] >= width:
                raise PlanError(f"layer {layer.layer}: unit {units[-1]} of an expert of width {width} (units)")
        for rank in layer.ranks or ():
            if rank is not None and rank > min(width, d_model):
                raise PlanError(f"layer {layer.layer}: rank {rank} of {width} x {d_model} matrices (ranks)")


def _factors(layer: LayerPlan) -> bool:
    return layer.factors


def _widths(plan: Plan) -> set[int | None]:
    """Numbers of units that experts keep; None stands for all."""
    return {None if units is None else len(units) for layer in plan.layers for units in layer.units or [None]}


def _cannot(layout: Layout, what: str, checkpoint: Checkpoint) -> str:
    """The refusal, with what can be done in its place."""
    padding = (
        "format 'padded' (dead experts that the router's selection bias never lets through: exact, saves no memory, "
        "and for different numbers of experts only)"
        if pads_exactly(checkpoint)
        else f"format 'padded' is none for {checkpoint.family.model_type}: its router has no selection bias, and dead "
        "experts would be chosen"
    )
    return (
        f"a {layout} folder cannot say {what}. Alternatives: semantics 'slice' with the same number of experts and "
        f"units in every layer (loads everywhere; --uniform makes a plan so); {padding}; format 'custom' (a modeling "
        "file in the folder: transformers with trust_remote_code, no other server)"
    )
