"""What calibration text showed of one network: the inputs that it got."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.convert.network import Network

# Tokens that go through a network at a time.
PIECE = 2048


@dataclass(frozen=True)
class Seen:
    """A dense network, the inputs x that it got on calibration text, and the seed of whatever is drawn for it."""

    network: Network
    x: Float[Tensor, "t d"]
    seed: int = 0

    def generator(self) -> torch.Generator:
        """A new generator, the same every time."""
        return torch.Generator().manual_seed(self.seed)

    @torch.no_grad()
    def hidden(self) -> Float[Tensor, "t w"]:
        """Every unit's activation on every token."""
        return torch.cat([self.network.hidden(part) for part in self.x.split(PIECE)])

    @torch.no_grad()
    def importance(self) -> Float[Tensor, "w"]:
        """Mean |h_u| |down_u| over the tokens: how much a unit adds to the output, in the length of what it adds."""
        total = torch.zeros(self.network.width, dtype=torch.float64)
        for part in self.x.split(PIECE):
            total += self.network.hidden(part).abs().double().sum(0).cpu()
        return total / max(1, len(self.x)) * self.network.down.double().norm(dim=1).cpu()
