"""Choices that are drawn, not computed: random numbers that are functions of what they are drawn for."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.routers.gates import shares
from moestro.routers.selects import Select
from moestro.routing import SparseRouting

# odd 64-bit constants of the golden ratio and of Stafford's mixer (as splitmix64 uses them), as signed numbers
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


class SampledSecond(Select):
    """The most probable expert, and a second one drawn from the others in proportion to their probabilities; gates are
    the two probabilities, or their shares of the two with `renormalize` (Lepikhin 2020, GShard, arXiv:2006.16668;
    drawn by the largest logit plus Gumbel noise as in the code of Xu 2023, arXiv:2305.02176, also in evaluation).

    Noise is a function of `seed` and of the token's own logits (rounded to bfloat16): a token is treated alike wherever
    it and the experts stand, and recomputing, resuming and evaluating again give the same, with no generator to keep.
    """

    def __init__(self, renormalize: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.renormalize, self.seed = renormalize, seed

    def check(self, n_experts: int) -> None:
        if n_experts < 2:
            raise ValueError(f"a second expert of {n_experts}, allowed: at least 2 experts")

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        falling, order = logits.detach().sort(dim=-1, descending=True, stable=True)
        # drawn by rank, so that noise goes with experts wherever they stand
        second = (falling + gumbel(falling, self.seed))[:, 1:].argmax(-1, keepdim=True) + 1
        expert = torch.cat([order[:, :1], order.gather(-1, second)], dim=-1)
        gates = logits.softmax(-1).gather(-1, expert)
        if self.renormalize:
            gates = shares(gates)
        return SparseRouting.from_topk(expert, gates, logits.shape[1], logits)

    def rows_per_token(self, n_experts: int) -> float:
        return 2

    def choices(self, n_experts: int) -> tuple[int | None, bool, tuple[str, ...]]:
        return 2, True, ("the second expert is drawn, not chosen",)


def gumbel(rows: Float[Tensor, "t e"], seed: int) -> Float[Tensor, "t e"]:
    """Standard Gumbel noise, one for each entry: a function of the whole row (in bfloat16), the column and `seed`."""
    bits = _mixed(_key(rows, seed)[:, None] + _STEP * torch.arange(1, rows.shape[1] + 1, device=rows.device))
    # 24 bits, the middle of each interval: never 0 nor 1, in float32 too
    uniform = (((bits >> 40) & 0xFFFFFF).to(rows.dtype) + 0.5) / 2**24
    return -torch.log(-torch.log(uniform))


def _key(rows: Float[Tensor, "t e"], seed: int) -> Int[Tensor, "t"]:
    """One number for every row, of which each bit depends on every entry but those of -inf."""
    # + 0.0 makes -0.0 and 0.0 the same
    entries = (rows.to(torch.bfloat16) + 0.0).view(torch.int16).to(torch.int64)
    place = _STEP * torch.arange(1, rows.shape[1] + 1, device=rows.device)
    each = _mixed(entries + place).masked_fill(rows.isneginf(), 0)
    # the seed as a tensor, whose product wraps around
    return _mixed(each.sum(-1) + _STEP * torch.full((), seed, device=rows.device))


def _mixed(bits: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Every bit of a 64-bit number spread over all of them; products wrap around."""
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * _FIRST
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)
