"""Pruning by how much routers' rows grew in fine-tuning (Chowdhury 2024, arXiv:2405.16646): no data, no forward pass,
no tensor but the routers'."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from moestro.compress.criteria import highest
from moestro.compress.plan import PlanError
from moestro.compress.source import RunSource
from moestro.formats import Checkpoint

# Largest change of a norm below which routers count as not trained.
STILL = 1e-6
# Names of the norm before the experts; one of them is there.
NORMS = ("model.layers.{layer}.post_attention_layernorm.weight", "model.layers.{layer}.pre_ff_layernorm.weight")


class RoutersStillError(PlanError):
    """Fine-tuning did not touch the routers, so their change says nothing."""


def norm_change(
    before: Float[Tensor, "e d"],
    after: Float[Tensor, "e d"],
    center: bool = False,
    gains: tuple[Float[Tensor, "d"], Float[Tensor, "d"]] | None = None,
) -> Float[Tensor, "e"]:
    """Delta_e = ||after_e|| - ||before_e||, in float64: the signed change of norms, not the norm of the change.

    `center` takes the mean row off first, a shift of all rows that softmax routing does not see. `gains` multiplies the
    columns by the gain of the norm before the router, before and after: what the router really sees. Both are ours.
    """
    rows = [before.double(), after.double()]
    if gains is not None:
        rows = [row * gain.double() for row, gain in zip(rows, gains, strict=True)]
    if center:
        rows = [row - row.mean(0) for row in rows]
    return rows[1].norm(dim=1) - rows[0].norm(dim=1)


def router_norm_changes(
    reference: Checkpoint | RunSource, tuned: Checkpoint | RunSource, center: bool = False, fold_norm: bool = False
) -> dict[int, Float[Tensor, "e"]]:
    """Delta of every expert of every layer, multi-token prediction included where both have it. Only router tensors
    are read, and the norms before them where `fold_norm`.

    Raises: PlanError where the two are not the same model.
    """
    if reference.family.model_type != tuned.family.model_type:
        raise PlanError(
            f"{reference.path} is a {reference.family.model_type}, {tuned.path} a {tuned.family.model_type}"
        )
    if reference.moe_layers != tuned.moe_layers:
        raise PlanError(
            f"experts in layers {reference.moe_layers} of {reference.path}, {tuned.moe_layers} of {tuned.path}"
        )
    both = [layer for layer in tuned.extra_layers if layer in reference.extra_layers]
    changes = {}
    for layer in (*tuned.moe_layers, *both):
        before, after = (folder.read(folder.router_tensors(layer)["weight"]) for folder in (reference, tuned))
        if before.shape != after.shape:
            raise PlanError(
                f"the router of layer {layer} is {tuple(before.shape)} in {reference.path}, {tuple(after.shape)} in "
                f"{tuned.path}: allowed: the same experts and width (the vocabulary may differ)"
            )
        gains = (_gain(reference, layer), _gain(tuned, layer)) if fold_norm else None
        changes[layer] = norm_change(before, after, center, gains)
    return changes


def require_moved(changes: Mapping[int, Float[Tensor, "e"]]) -> None:
    """Raises: RoutersStillError where no router row's norm changed."""
    most = max(float(change.abs().max()) for change in changes.values())
    if most < STILL:
        raise RoutersStillError(
            f"the largest change of a router row's norm is {most:.1e}: fine-tuning left the routers alone (frozen, or "
            "adapters on other matrices), so this method has nothing to go by. Choose another method, another "
            "--reference, or --option force=true to prune the lowest numbers"
        )


def kept_by_change(change: Float[Tensor, "e"], n_kept: int, groups: int = 1) -> tuple[int, ...]:
    """The experts whose norms grew most, ascending, equally many of each of `groups` groups. Of equal ones the lowest
    number goes first, as in the paper's ascending order; the authors' sort leaves such ties to chance.

    Raises: ValueError for a number that the groups do not share.
    """
    last = len(change) - 1
    return tuple(sorted(last - expert for expert in highest(change.flip(0), n_kept, groups)))


def _gain(checkpoint: Checkpoint | RunSource, layer: int) -> Tensor:
    if isinstance(checkpoint, RunSource):
        return checkpoint.read(f"blocks.{layer}.ffn_norm.weight")
    names = [name.format(layer=layer) for name in NORMS]
    there = [name for name in names if name in checkpoint.shards]
    if len(there) != 1:
        raise PlanError(f"{checkpoint.path} has none of {' and '.join(names)}, which fold_norm needs")
    return checkpoint.read(there[0])
