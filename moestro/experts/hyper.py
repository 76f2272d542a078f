"""`HyperExpert`: one small expert more for every token, generated from what the experts that it did not choose know."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import Cost
from moestro.ops.precision import without_autocast
from moestro.ops.reindexed import normal_like, reindexed
from moestro.routing import Routing, SparseRouting


@dataclass(frozen=True)
class Adapters:
    """Bottleneck experts relu(x D + a) U + b, one for each set of experts."""

    down: Float[Tensor, "u d r"]
    down_bias: Float[Tensor, "u r"]
    up: Float[Tensor, "u r d"]
    up_bias: Float[Tensor, "u d"]

    def tensors(self) -> tuple[Tensor, ...]:
        """The four, one set a row."""
        return self.down, self.down_bias, self.up, self.up_bias


class HyperGenerator(nn.Module):
    """(selection p_u [u z], layer [c]) -> `Adapters` (Zhao 2024, HyperMoE, arXiv:2402.12656; from its released code).

    h = relu(W [p; layer] + b) of `hidden` units, and four linear maps of h. One generator serves all layers. The maps
    start so small that outputs are near 0: weights uniform within 1e-3 sqrt(3 / (hidden * d)) for the down matrix,
    with rank in place of d for the up matrix, 1e-3 sqrt(3 / hidden) for the biases; the maps' own biases at 0.
    """

    def __init__(self, d_model: int, rank: int = 64, selection: int = 128, layer: int = 10, hidden: int = 128) -> None:
        super().__init__()
        if min(rank, selection, layer, hidden) < 1:
            raise ValueError(f"rank={rank}, selection={selection}, layer={layer}, hidden={hidden}, allowed: at least 1")
        self.d_model, self.rank, self.selection, self.layer = d_model, rank, selection, layer
        self.trunk = nn.Linear(selection + layer, hidden)
        sizes = {"down": (d_model * rank, d_model), "down_bias": (rank, 1)}
        sizes |= {"up": (rank * d_model, rank), "up_bias": (d_model, 1)}
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, size) for name, (size, _) in sizes.items()})
        for name, (_, fan) in sizes.items():
            bound = 1e-3 * (3 / (hidden * fan)) ** 0.5
            nn.init.uniform_(self._head(name).weight, -bound, bound)
            nn.init.zeros_(self._head(name).bias)

    def _head(self, name: str) -> nn.Linear:
        return self.heads[name]  # type: ignore[return-value]

    def forward(self, selection: Float[Tensor, "u z"], layer: Float[Tensor, "c"]) -> Adapters:
        h = F.relu(self.trunk(torch.cat([selection, layer.expand(len(selection), -1)], dim=-1)))
        down, up = self._head("down")(h), self._head("up")(h)
        return Adapters(
            down.unflatten(-1, (self.d_model, self.rank)),
            self._head("down_bias")(h),
            up.unflatten(-1, (self.rank, self.d_model)),
            self._head("up_bias")(h),
        )

    def set_flops(self) -> float:
        """Forward FLOPs of one adapter's generation."""
        heads = sum(self._head(name).weight.numel() for name in self.heads)
        return 2.0 * (self.trunk.weight.numel() + heads)


class HyperExpert(nn.Module):
    """y_t = relu(x_t D + a) U + b, weighted by no gate, with weights that the shared `generator` makes of the layer and
    of the set of experts that token t did not choose (Zhao 2024, HyperMoE, arXiv:2402.12656; from its released code).

    s = sum of the unchosen experts' embeddings (0 where all are chosen), p = MLP(s), adapter = generator(p, layer). An
    adapter depends on the set alone: one is generated for each different set of the batch, at most one for each expert
    with top-1. Generation runs in the weights' own precision under autocast. Without gradients and in evaluation,
    the newest `cached` adapters are kept until a weight changes. Nothing is learned by the router from here; embeddings
    of experts that nobody chose learn. Sets are of the rows that are served, after a capacity.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        generator: HyperGenerator,
        embedding: int = 128,
        hidden: int = 128,
        init_std: float = 0.02,
        cached: int = 256,
    ) -> None:
        super().__init__()
        if generator.d_model != d_model or min(n_experts, embedding, hidden, cached) < 1:
            raise ValueError(
                f"n_experts={n_experts}, embedding={embedding}, hidden={hidden}, cached={cached}, allowed: at least 1, "
                f"and a generator of width {d_model} (this one has {generator.d_model})"
            )
        self.generator, self.cached, self.init_std = generator, cached, init_std
        self.experts = nn.Parameter(torch.randn(n_experts, embedding) * init_std)
        self.layer = nn.Parameter(torch.randn(generator.layer))
        first, second = nn.Linear(embedding, hidden), nn.Linear(hidden, generator.selection)
        self.select = nn.Sequential(first, nn.ReLU(), second)
        for linear in (first, second):
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)
        self._kept: dict[bytes, tuple[Tensor, ...]] = {}
        self._made_of: tuple = ()

    @property
    def n_experts(self) -> int:
        return len(self.experts)

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        """Raises: ValueError for routings in which no expert is left out (soft, slots)."""
        sets, member = chosen_sets(routing)
        with without_autocast(x):
            adapters = self.generated(sets) if self.training or torch.is_grad_enabled() else self._remembered(sets)
        order = member.argsort(stable=True)
        counts = torch.bincount(member, minlength=len(sets)).tolist()
        sorted_rows = zip(x[order].split(counts), *adapters.tensors(), strict=True)
        rows = [F.linear(F.relu(F.linear(z, d.T, a)), u.T, b) for z, d, a, u, b in sorted_rows]
        y = torch.cat(rows) if rows else x
        return torch.zeros_like(y).index_copy(0, order, y)

    def train(self, mode: bool = True) -> "HyperExpert":
        """Also forgets the adapters that were kept: not every optimizer tells that it changed a weight."""
        self._kept = {}
        return super().train(mode)

    def generated(self, sets: Bool[Tensor, "u e"]) -> Adapters:
        """The adapters for tokens that chose these sets of experts."""
        unchosen = (~sets).to(self.experts.dtype) @ self.experts
        return self.generator(self.select(unchosen), self.layer)

    def _remembered(self, sets: Bool[Tensor, "u e"]) -> Adapters:
        """The same, each generated once for as long as no weight changes."""
        now = tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())
        if now != self._made_of:
            self._kept, self._made_of = {}, now
        keys = [row.tobytes() for row in sets.cpu().numpy()]
        new = [i for i, key in enumerate(keys) if key not in self._kept]
        if new:
            made = self.generated(sets[torch.tensor(new, device=sets.device)]).tensors()
            self._kept |= {keys[i]: tuple(each) for i, *each in zip(new, *made, strict=True)}
        found = [self._kept[key] for key in keys]
        for key in list(self._kept)[: max(0, len(self._kept) - self.cached)]:
            del self._kept[key]
        return Adapters(*(torch.stack(each) for each in zip(*found, strict=True))) if found else self.generated(sets)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make new expert j the old expert `index[j]`; -1 makes a fresh one."""
        fresh = normal_like(self.experts, len(index)) * self.init_std
        self.experts = nn.Parameter(reindexed(self.experts, index, fresh))

    def expected_token_flops(self, rows_per_token: float = 1.0) -> float:
        """Forward FLOPs of one token; generation, which all tokens of a batch share, is not counted."""
        return 4.0 * self.generator.d_model * self.generator.rank

    def flops(self, routing: Routing) -> Cost:
        """Forward FLOPs on every token of `routing`, and, while training, of its sets' generation."""
        tokens = Cost.exact(self.expected_token_flops() * routing.n_tokens)
        if not self.training:
            return tokens
        select = sum(linear.weight.numel() for linear in self.select if isinstance(linear, nn.Linear))
        each = 2.0 * (self.experts.numel() + select) + self.generator.set_flops()
        return tokens + Cost.exact(len(chosen_sets(routing)[0]) * each)


def chosen_sets(routing: Routing) -> tuple[Bool[Tensor, "u e"], Int[Tensor, "t"]]:
    """The different sets of experts that tokens chose, and each token's.

    Raises: ValueError for routings in which no expert is left out.
    """
    if not isinstance(routing, SparseRouting):
        raise ValueError(f"a hyper-expert is made of the experts not chosen; {type(routing).__name__} leaves none out")
    mask = torch.zeros(routing.n_tokens, routing.n_experts, dtype=torch.bool, device=routing.token.device)
    mask[routing.token, routing.expert] = True
    return mask.unique(dim=0, return_inverse=True)
