"""Which parts of a model let a token depend on later ones."""

from torch import nn

from moestro.model.block import Block
from moestro.routers.base import Router


def looking_ahead(model: nn.Module) -> dict[str, nn.Module]:
    """The parts to which tokens are more than themselves and earlier ones, by name: blocks, and routers of layers and
    adapters."""
    parts = {name: part for name, part in model.named_modules() if isinstance(part, Router | Block)}
    return {name.removesuffix(".router"): part for name, part in parts.items() if not part.causal}


def require_causal(model: nn.Module) -> None:
    """Raises: ValueError naming the first part that looks ahead."""
    for name, part in looking_ahead(model).items():
        raise ValueError(
            f"{name}: {type(part).__name__} looks at other tokens, so predictions would depend on the future; "
            "say allow_non_causal: true to train it all the same"
        )
