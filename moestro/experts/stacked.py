"""Experts of one width in stacked tensors, one matrix behind the other: the layout of public checkpoints."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.experts.base import ExpertBank
from moestro.experts.norms import ExpertNorms, activation_remarks, norms_of
from moestro.ops import backend, expert_ffn, few_rows_ffn, skips_sorting
from moestro.ops.activations import activation as find
from moestro.ops.reindexed import normal_like, reindexed
from moestro.routing import Routing, SparseRouting


class StackedExperts(ExpertBank):
    """Banks whose parameters all have one entry for each expert in their first dimension."""

    width: int
    d_model: int
    down: nn.Parameter

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return len(self.down)

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        return super().forward(x, by_rank(routing) if isinstance(routing, SparseRouting) else routing)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        for name, old in [*self.named_parameters(recurse=False)]:
            setattr(self, name, nn.Parameter(reindexed(old, index, self._fresh(name, normal_like(old, len(index))))))

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        return tuple((parameter, slice(expert, expert + 1)) for parameter in self.parameters(recurse=False))

    def own_parameters(self) -> float:
        return float(sum(parameter.numel() for parameter in self.parameters(recurse=False)) / self.n_experts)

    def row_flops(self) -> float:
        return 6.0 * self.d_model * self.width

    def row_widths(self) -> float:
        return float(self.width)

    def _fresh(self, name: str, normal: Tensor) -> Tensor:
        """New entries of the parameter `name`, from as many standard normal numbers."""
        raise NotImplementedError


class StackedBank(StackedExperts):
    """Experts FFN_e(x) = W_down,e (act(W_gate,e x) * W_up,e x) of equal widths w, no biases: `gate_up` [e 2w d], rows
    of the gate before those of up, and `down` [e d w], as transformers keeps them (Mixtral, Qwen-MoE, OLMoE, DeepSeek).

    Under the backend `reference`, rows of an expert are computed in the order of transformers' loop (rank of the
    choice, then token) and summed expert after expert, so that results are the loop's to the last bit.
    """

    def __init__(self, d_model: int, n_experts: int, width: int, activation: str = "silu") -> None:
        super().__init__()
        if n_experts < 1 or width < 1:
            raise ValueError(f"n_experts={n_experts}, width={width}, allowed: at least 1 each")
        find(activation)
        self.d_model, self.width, self.activation = d_model, width, activation
        self.gate_up = nn.Parameter(torch.randn(n_experts, 2 * width, d_model) * d_model**-0.5)
        self.down = nn.Parameter(torch.randn(n_experts, d_model, width) * width**-0.5)

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        act, out = find(self.activation).forward, [z.new_zeros(0, self.d_model)]
        matrices = zip(self.gate_up.unbind(0), self.down.unbind(0), strict=True)
        for rows, (gate_up, down) in zip(z.split(offsets.diff().tolist()), matrices, strict=True):
            gate, up = nn.functional.linear(rows, gate_up).chunk(2, dim=-1)
            out.append(nn.functional.linear(act(gate) * up, down))
        return torch.cat(out)

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        if not isinstance(routing, SparseRouting) or backend.active() == "reference":
            return super().forward(x, routing)
        w_in, widths = self.gate_up.flatten(0, 1), [self.width] * self.n_experts
        if skips_sorting(routing.n_rows, len(x), self.n_experts, x, routing.weight, w_in, self.down):
            r = routing
            return few_rows_ffn(x, r.token, r.expert, r.weight, w_in, self.down, widths, self.activation)
        r = routing.grouped()
        return expert_ffn(x, r.token, r.weight, r.offsets, w_in, self.down, widths, self.activation)

    def norms(self) -> ExpertNorms:
        return norms_of([*zip(self.gate_up, self.down, strict=True)], activation_remarks(self.activation, glu=True))

    def _fresh(self, name: str, normal: Tensor) -> Tensor:
        return normal * normal.shape[-1] ** -0.5


class ClampedBank(StackedExperts):
    """gpt-oss's experts (arXiv:2508.10925; the code of transformers 5.23), of equal widths w, with biases everywhere:

    g, u = the even and odd columns of x W_gate_up + b, g clamped from above and u on both sides by `limit`;
    FFN(x) = ((u + 1) * g sigmoid(alpha g)) W_down + b'.

    `gate_up` [e d 2w] and `down` [e w d] are transposed with respect to other families' and as transformers keeps them.
    """

    def __init__(
        self, d_model: int, n_experts: int, width: int, alpha: float = 1.702, limit: float | None = 7.0
    ) -> None:
        super().__init__()
        if n_experts < 1 or width < 1:
            raise ValueError(f"n_experts={n_experts}, width={width}, allowed: at least 1 each")
        if limit is not None and not limit > 0:
            raise ValueError(f"limit={limit}, allowed: above 0, or null for none")
        self.d_model, self.width, self.alpha, self.limit = d_model, width, alpha, limit
        self.gate_up = nn.Parameter(torch.randn(n_experts, d_model, 2 * width) * d_model**-0.5)
        self.gate_up_bias = nn.Parameter(torch.zeros(n_experts, 2 * width))
        self.down = nn.Parameter(torch.randn(n_experts, width, d_model) * width**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(n_experts, d_model))

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        out = [z.new_zeros(0, self.d_model)]
        stacked = (self.gate_up, self.gate_up_bias, self.down, self.down_bias)
        for e, rows in enumerate(z.split(offsets.diff().tolist())):
            gate_up, gate_up_bias, down, down_bias = (parameter[e] for parameter in stacked)
            out.append(self._gated(rows @ gate_up + gate_up_bias) @ down + down_bias)
        return torch.cat(out)

    def _gated(self, both: Float[Tensor, "n w2"]) -> Float[Tensor, "n w"]:
        gate, up = both[..., ::2], both[..., 1::2]
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))

    def _fresh(self, name: str, normal: Tensor) -> Tensor:
        return torch.zeros_like(normal) if name.endswith("bias") else normal * normal.shape[1] ** -0.5


def by_rank(routing: SparseRouting) -> SparseRouting:
    """The same rows, all tokens' first choices before all second ones; unchanged where tokens differ in number."""
    if routing.fixed is None:
        return routing
    order = torch.arange(routing.n_rows, device=routing.token.device).view(-1, routing.fixed).T.flatten()
    token, expert, weight = routing.token[order], routing.expert[order], routing.weight[order]
    return SparseRouting(token, expert, weight, routing.n_tokens, routing.n_experts, routing.logits)
