"""What a layer loses when experts go: the change of its output on calibration tokens, tokens routed anew."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.compress.masking import without
from moestro.compress.observed import expert_output, gates_of
from moestro.layers.moe import MoELayer


class Damage:
    """||F(X) - F without the experts(X)||_F over the tokens X of one layer, for any set of its experts (NAEE, Lu 2024,
    arXiv:2402.14800, section 3.1; MoE-I2, arXiv:2411.01016, stage 1); 0 exactly for none.

    Squares are summed over all tokens before the root is taken: sums of the norms of batches, as public code has,
    depend on the size of the batches. Outputs enter through their inner products, M_t = [f_i(x_t) . f_j(x_t)], kept in
    float64: with g - g' the change of the gates, a token's squared error is (g - g')' M_t (g - g'), so that no set
    costs more than routing. Memory: 8 bytes * tokens * experts^2. Shared experts, which nothing removes, cancel."""

    def __init__(self, layer: MoELayer, x: Float[Tensor, "t d"], piece: int = 512) -> None:
        self.layer, self.x = layer, x
        with torch.no_grad():
            self.products = torch.cat([self._products(part) for part in x.split(piece)])
            self.gates = self._gates(())

    def _products(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n e e"]:
        each = [expert_output(self.layer, e, x) for e in range(self.layer.router.n_experts)]
        outputs = torch.stack(each, 1).double()
        return outputs @ outputs.mT

    def _gates(self, experts: Sequence[int]) -> Float[Tensor, "t e"]:
        with without(self.layer, experts):
            return gates_of(self.layer.router(self.x))[0].double()

    @torch.no_grad()
    def __call__(self, experts: Sequence[int]) -> float:
        """The damage of removing these experts.

        Raises: ValueError where too few are left.
        """
        return float(self.squared(self._gates(experts)).sum().clamp(min=0).sqrt())

    def squared(self, gates: Float[Tensor, "t e"]) -> Float[Tensor, "t"]:
        """Squared error of every token, had it these gates."""
        change = self.gates - gates
        return torch.einsum("ti,tij,tj->t", change, self.products, change)

    def relative(self, experts: Sequence[int]) -> float:
        """The damage as a share of the norm of the layer's output."""
        whole = float(self.squared(torch.zeros_like(self.gates)).sum().sqrt())
        return self(experts) / whole if whole > 0 else 0.0

    def of_each(self) -> list[float]:
        """The damage of removing each expert alone: e_lj of MoE-I2, whose sum is the layer's importance."""
        return [self((expert,)) for expert in range(self.layer.router.n_experts)]
