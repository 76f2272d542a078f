"""`Plan`: what is to become of the experts of a checkpoint, expert by expert. Experts are numbered as in the source."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Semantics = Literal["slice", "remap", "zero"]
HASH = re.compile(r"[0-9a-f]{64}")


class PlanError(ValueError):
    """A plan that contradicts itself, cannot be read, or belongs to another checkpoint; the message says where."""


@dataclass(frozen=True)
class Fingerprint:
    """By what a checkpoint is known again, as SHA-256 (hexadecimal): its configuration file, its index ("" where one
    file holds all tensors), names and headers of its files, and the content of its router tensors, which any training
    changes and which are small enough to read whole."""

    model_type: str
    config: str
    index: str
    headers: str
    routers: str

    def __post_init__(self) -> None:
        for name in ("config", "index", "headers", "routers"):
            value = getattr(self, name)
            if not HASH.fullmatch(value) and (name, value) != ("index", ""):
                raise PlanError(f"{name}={value!r}, allowed: 64 hexadecimal digits")


@dataclass(frozen=True)
class Calibration:
    """The text that a method looked at: SHA-256 of its token ids, their number, and where they are from in words."""

    sha256: str
    tokens: int
    text: str = ""

    def __post_init__(self) -> None:
        if not HASH.fullmatch(self.sha256) or self.tokens < 1:
            raise PlanError(f"sha256={self.sha256!r}, tokens={self.tokens}, allowed: 64 hexadecimal digits, at least 1")


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file beside the plan, for what JSON does not hold: under the name of a tensor of the compressed
    checkpoint, what stands there in place of what would be written (healed weights); under `moments.L.E.input` [d, d]
    and `moments.L.E.hidden` [w, w], mean x x^T of what expert E's in- and out-projections are applied to, for low-rank
    factors that minimise the error of outputs."""

    file: str
    sha256: str

    def __post_init__(self) -> None:
        if not HASH.fullmatch(self.sha256) or not self.file or "/" in self.file:
            raise PlanError(f"file={self.file!r}, sha256={self.sha256!r}, allowed: a file name, 64 hexadecimal digits")


@dataclass(frozen=True)
class Quantisation:
    """How the experts' matrices are stored: `group_size` inputs share a scale, 0 for one scale an output channel."""

    scheme: Literal["int8", "int4", "fp8"]
    group_size: int = 0
    calibrated: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in ("int8", "int4", "fp8"):
            raise PlanError(f"scheme={self.scheme!r}, allowed: int8, int4, fp8")
        if self.group_size < 0:
            raise PlanError(f"group_size={self.group_size}, allowed: 0 or above")
        if self.calibrated and self.scheme == "fp8":
            raise PlanError("calibrated rounding is for integers (int8, int4), not fp8")


@dataclass(frozen=True)
class Group:
    """Experts that become one: the sum of `weights[i]` times the matrices of `members[i]`, their hidden units put in
    the order of the kept member's first where `align`."""

    members: tuple[int, ...]
    weights: tuple[float, ...]
    align: bool = False

    def __post_init__(self) -> None:
        if not self.members or list(self.members) != sorted(set(self.members)):
            raise PlanError(f"members={list(self.members)}, allowed: at least one expert, ascending, none twice")
        if len(self.weights) != len(self.members):
            raise PlanError(f"weights={list(self.weights)}, allowed: one for each of {len(self.members)} members")
        if not all(map(math.isfinite, self.weights)) or not sum(self.weights) > 0:
            raise PlanError(f"weights={list(self.weights)}, allowed: finite numbers whose sum is above 0")


@dataclass(frozen=True)
class LayerPlan:
    """One layer. `keep`: the experts that survive, ascending; new expert j is old expert `keep[j]`. The rest is aligned
    with `keep`, where it is given: `groups[j]` are the experts merged into new expert j, `keep[j]` among them;
    `ranks[j]` is the rank of the factors that replace each of its matrices, None for whole ones; `units[j]` are its
    hidden units that stay, ascending, None for all.

    `skip_below`: a token's second and further experts are left out where their weight is below this share of the first
    one's, and the others are renormalised. For reports only: `scores` of all old experts by criterion, `rows` that each
    old expert computed on the calibration text, and the mean `entropy` of the router there in nats.
    """

    layer: int
    n_experts: int
    keep: tuple[int, ...]
    groups: tuple[Group, ...] | None = None
    ranks: tuple[int | None, ...] | None = None
    units: tuple[tuple[int, ...] | None, ...] | None = None
    skip_below: float | None = None
    scores: dict[str, list[float]] = field(default_factory=dict, hash=False)
    rows: tuple[int, ...] | None = None
    entropy: float | None = None

    def __post_init__(self) -> None:
        if self.layer < 0 or self.n_experts < 1:
            raise PlanError(f"layer={self.layer}, n_experts={self.n_experts}, allowed: from 0, at least 1")
        if not self.keep or not ascending(self.keep, self.n_experts):
            allowed = f"at least one of 0 to {self.n_experts - 1}, ascending, none twice"
            raise PlanError(f"keep={list(self.keep)}, allowed: {allowed} (layer {self.layer})")
        for name in ("groups", "ranks", "units"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.keep):
                raise PlanError(f"{name} has {len(value)} entries, keep has {len(self.keep)} (layer {self.layer})")
        self._check_groups()
        self._check_matrices()
        self._check_figures()

    def _check_groups(self) -> None:
        members = [member for group in self.groups or () for member in group.members]
        if len(set(members)) < len(members) or any(not 0 <= member < self.n_experts for member in members):
            allowed = f"each of 0 to {self.n_experts - 1} once at most"
            raise PlanError(f"groups have the members {sorted(members)}, allowed: {allowed} (layer {self.layer})")
        for kept, group in zip(self.keep, self.groups or (), strict=False):
            if kept not in group.members:
                raise PlanError(f"groups: {list(group.members)} lacks its kept expert {kept} (layer {self.layer})")

    def _check_matrices(self) -> None:
        for rank in self.ranks or ():
            if rank is not None and rank < 1:
                raise PlanError(f"ranks has {rank}, allowed: at least 1, or null (layer {self.layer})")
        for units in self.units or ():
            if units is not None and not (units and ascending(units)):
                raise PlanError(f"units has {list(units)[:8]}, allowed: at least one, ascending (layer {self.layer})")
        if self.skip_below is not None and not 0 <= self.skip_below < 1:
            raise PlanError(f"skip_below={self.skip_below}, allowed: 0 to below 1, or null (layer {self.layer})")

    def _check_figures(self) -> None:
        for name, values in {**self.scores, "rows": [0] * self.n_experts if self.rows is None else self.rows}.items():
            if not isinstance(values, Sequence) or len(values) != self.n_experts or not all(map(_is_finite, values)):
                allowed = f"a finite number for each of {self.n_experts} experts"
                raise PlanError(f"{name}: allowed: {allowed} (layer {self.layer})")

    @property
    def n_kept(self) -> int:
        """Experts that survive."""
        return len(self.keep)

    @property
    def new_ids(self) -> tuple[int, ...]:
        """For every old expert the new one that stands for it: itself, its group's; -1 for none."""
        new = [-1] * self.n_experts
        for j, kept in enumerate(self.keep):
            for member in self.groups[j].members if self.groups else (kept,):
                new[member] = j
        return tuple(new)

    @property
    def merges(self) -> bool:
        """Whether a new expert is made of several old ones, or of one times a number."""
        return any(group.weights != (1.0,) for group in self.groups or ())

    @property
    def factors(self) -> bool:
        """Whether a matrix becomes a product."""
        return any(rank is not None for rank in self.ranks or ())

    @property
    def narrows(self) -> bool:
        """Whether an expert loses hidden units."""
        return any(units is not None for units in self.units or ())

    @property
    def identical(self) -> bool:
        """Whether the layer stays as it is."""
        changes = self.merges or self.factors or self.narrows or self.skip_below is not None
        return self.n_kept == self.n_experts and not changes


@dataclass(frozen=True)
class Plan:
    """What `moestro compress` is to do with the checkpoint that `source` knows again: one `LayerPlan` for every layer
    with experts, ascending.

    `semantics` of removed experts: "slice", their router rows go, so that tokens choose among the others; "remap", all
    router rows stay and `groups` say which new expert answers for an old one, weights of one that is met twice adding
    up; "zero", all rows stay and what is removed answers 0. `merged_rows` says which router row a group has under
    "slice": the kept member's, or the mean by the group's weights.

    `method`, `ratio` (of routed experts removed), `options`, `seed`, `reference`, `calibration`, `versions` say how the
    plan was made, `quantise` how the experts' matrices are stored afterwards.
    """

    method: str
    ratio: float
    source: Fingerprint
    layers: tuple[LayerPlan, ...]
    semantics: Semantics = "slice"
    merged_rows: Literal["kept", "mean"] = "kept"
    quantise: Quantisation | None = None
    tensors: TensorFile | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    seed: int = 0
    reference: Fingerprint | None = None
    calibration: Calibration | None = None
    versions: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise PlanError(f"ratio={self.ratio}, allowed: 0 to below 1")
        numbers = [layer.layer for layer in self.layers]
        if not numbers or not ascending(numbers):
            raise PlanError(f"layers are {numbers}, allowed: at least one, ascending, none twice")
        for layer in self.layers:
            if self.semantics == "remap" and -1 in layer.new_ids:
                lost = [old for old, new in enumerate(layer.new_ids) if new < 0]
                raise PlanError(f"layers: under 'remap' every expert has a group, layer {layer.layer} lacks {lost}")

    @property
    def identical(self) -> bool:
        """Whether applying it changes nothing."""
        return all(layer.identical for layer in self.layers) and self.quantise is None and self.tensors is None

    def of(self, layer: int) -> LayerPlan | None:
        """The plan of one layer, None where it has none."""
        return next((found for found in self.layers if found.layer == layer), None)


def rows_of(layers: Sequence[LayerPlan]) -> Literal["kept", "mean"]:
    """`Plan.merged_rows` of plans that a method made: a mean where a group has no member that stands for it alone."""
    return "mean" if any(layer.merges for layer in layers) else "kept"


def ascending(values: Sequence[int], end: float = math.inf) -> bool:
    """Whether values ascend, none twice, from 0 to below `end`."""
    return all(0 <= value < end for value in values) and all(a < b for a, b in zip(values, values[1:], strict=False))


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
