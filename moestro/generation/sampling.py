"""The next token from its logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

SEEDS = 2**63


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at temperature 0, else a draw from softmax(logits / temperature).

    `top_k` first leaves the k likeliest, `top_p` of those the fewest whose probabilities reach p (Holtzman 2020,
    arXiv:1904.09751), at least one. The same `seed` draws the same tokens from the same logits; None draws a new one.

    Raises: ValueError for a value that is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature={self.temperature}; allowed: 0 (the likeliest token) to 100")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}; allowed: 0 to 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}; allowed: at least 1")
        if self.seed is not None and not -SEEDS <= self.seed < SEEDS:
            raise ValueError(f"seed={self.seed}; allowed: whole numbers of 64 bits")

    def generator(self) -> torch.Generator:
        """The source of the draws; on the CPU, so that a seed means the same on every device."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token from the logits [v] of all.

        Raises: ArithmeticError where the logits are not numbers.
        """
        logits = logits.detach().cpu().double()
        if not bool(torch.isfinite(logits.max())):
            raise ArithmeticError("the model's logits are not finite")
        if self.temperature == 0.0:
            return int(logits.argmax())
        probabilities, tokens = self._kept(logits)
        return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])

    def _kept(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The (unnormalised) probabilities of the tokens that may be drawn, and their ids, likeliest first."""
        ordered, tokens = torch.sort(logits / self.temperature, descending=True, stable=True)
        probabilities = torch.softmax(ordered[: self.top_k], dim=0)
        before = probabilities.cumsum(0) - probabilities
        kept = before < self.top_p if self.top_p < 1.0 else torch.ones_like(before, dtype=torch.bool)
        kept[0] = True
        return probabilities.where(kept, 0.0), tokens
