"""The experts of a stock model of transformers under its own implementations and under ours, in one run.

python -m bench.stock_experts [--quick] [--bfloat16] [--json bench/results/stock-experts-cpu.json]

The experts module is transformers' (Mixtral's, at its own sizes and at OLMoE's), its weights are the same tensors for
every contestant, and the choices are those of a random router. The yardstick for outputs and gradients is the loop
`eager`.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from bench.experts import gradients
from bench.harness import Row, agree, arguments, clock, compare, report
from moestro import hf

PEERS = ("eager", "grouped_mm", "batched_mm")
# d, experts, width, experts a token: those of OLMoE (arXiv:2409.02060), and of Mixtral (arXiv:2401.04088) at an eighth
# of each side
SHAPES = {"OLMoE": (2048, 64, 1024, 8), "Mixtral / 8": (512, 8, 1792, 2)}
QUICK = {"quick": (128, 8, 96, 2)}
TOKENS = 512
# batched_mm copies the matrices of every row's expert: beyond this it is left out
MOST_COPIED = 2**30
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Case:
    """One experts module, tokens, and choices of a random router."""

    def __init__(self, sizes: tuple[int, int, int, int], tokens: int, dtype: torch.dtype) -> None:
        d, n_experts, width, top_k = sizes
        self.config = SimpleNamespace(
            num_local_experts=n_experts, hidden_size=d, intermediate_size=width, hidden_act="silu"
        )
        self.config._experts_implementation = "eager"
        self.experts = MixtralExperts(self.config).to(dtype)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.x = torch.randn(tokens, d, dtype=dtype, requires_grad=True)
        gates, self.ids = torch.randn(tokens, n_experts).softmax(-1).topk(top_k)
        self.gates = (gates / gates.sum(-1, keepdim=True)).requires_grad_()
        copied = tokens * top_k * 3 * d * width * self.x.element_size()
        self.peers = [name for name in PEERS if name != "batched_mm" or copied <= MOST_COPIED]

    def forward(self, implementation: str) -> Tensor:
        self.config._experts_implementation = implementation
        return self.experts(self.x, self.ids, self.gates)

    def rows(self, name: str, rounds: int) -> list[Row]:
        """Forward alone, and forward with backward."""
        contestants = {"ours": hf.MOESTRO, **{peer: peer for peer in self.peers}}
        leaves = {"tokens": self.x, "gates": self.gates, **dict(self.experts.named_parameters())}
        both = {
            shown: gradients(lambda i=implementation: self.forward(i), leaves.values())
            for shown, implementation in contestants.items()
        }
        answer, found = self.forward("eager").detach(), both["eager"]()
        for shown, implementation in contestants.items():
            agree(f"{name}, {shown}", self.forward(implementation), answer, TOLERANCE[self.x.dtype])
            for leaf, have, want in zip(leaves, both[shown](), found, strict=True):
                agree(f"{name}, {shown}, gradient of {leaf}", have, want, TOLERANCE[self.x.dtype])
        with torch.no_grad():
            forward = {shown: (lambda i=i: self.forward(i)) for shown, i in contestants.items()}
            rows = compare(name, "forward", clock(forward, rounds))
        return rows + compare(name, "forward + backward", clock(both, rounds))


def main() -> None:
    options = arguments(__doc__ or "", bfloat16="weights and tokens in bfloat16")
    dtype = torch.bfloat16 if options.bfloat16 else torch.float32
    rows = []
    for name, sizes in (QUICK if options.quick else SHAPES).items():
        for tokens in (1, 64) if options.quick else (1, TOKENS):
            case = Case(sizes, tokens, dtype)
            rows += case.rows(
                f"{name}, {tokens} tokens, {str(dtype).removeprefix('torch.')}", 3 if options.quick else 5
            )
    absent = [f"batched_mm is left out where it copies more than {MOST_COPIED // 2**30} GiB of weights"]
    report("bench/stock_experts.py", rows, options, absent)


if __name__ == "__main__":
    main()
