"""Banks of feed-forward experts, however they store their matrices, as units that methods merge, narrow and factor."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.compress.units import Units, units_of
from moestro.experts import FFNBank, StackedBank
from moestro.layers.moe import MoELayer
from moestro.ops.activations import activation as find


@dataclass(frozen=True)
class FeedForward:
    """The matrices of a bank: every expert's in-projection, gate rows before those of up, and its out-projection."""

    bank: FFNBank | StackedBank

    @staticmethod
    def of(layer: MoELayer) -> "FeedForward":
        """The layer's experts.

        Raises: ValueError where they are not feed-forward networks without biases in one bank.
        """
        banks = layer.banks()
        if len(banks) != 1 or not isinstance(banks[0], FFNBank | StackedBank):
            kinds = ", ".join(type(bank).__name__ for bank in banks)
            raise ValueError(f"banks {kinds}, allowed for methods that read experts' matrices: FFNBank, StackedBank")
        return FeedForward(banks[0])

    @property
    def glu(self) -> bool:
        """Whether experts have a gate."""
        return not isinstance(self.bank, FFNBank) or self.bank.glu

    @property
    def d_model(self) -> int:
        """Width of the model."""
        return self.bank.w_out.d_model if isinstance(self.bank, FFNBank) else self.bank.d_model

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden units of every expert."""
        return self.bank.widths if isinstance(self.bank, FFNBank) else (self.bank.width,) * self.bank.n_experts

    def matrices(self, expert: int) -> tuple[Float[Tensor, "_ d"], Float[Tensor, "d w"]]:
        """In-projection and out-projection of one expert."""
        if isinstance(self.bank, FFNBank):
            return self.bank.w_in.matrices()[expert].detach(), self.bank.w_out.matrices()[expert].detach()
        return self.bank.gate_up[expert].detach(), self.bank.down[expert].detach()

    def units(self, expert: int) -> Units:
        """The hidden units of one expert."""
        inside, out = self.matrices(expert)
        gate, up = inside.chunk(2) if self.glu else (None, inside)
        return units_of(gate, up, out)

    def hidden(self, inside: Float[Tensor, "_ d"], x: Float[Tensor, "n d"]) -> Float[Tensor, "n w"]:
        """The hidden units' values on tokens, of an expert with this in-projection."""
        values, act = x @ inside.T, find(self.bank.activation).forward
        if not self.glu:
            return act(values)
        gate, up = values.chunk(2, dim=-1)
        return act(gate) * up

    def run(self, units: Units, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What an expert of these units answers."""
        *inside, out = units.split(self.d_model, dim=1)
        return self.hidden(torch.cat(inside), x) @ out

    def bank_of(self, experts: Sequence[Units]) -> FFNBank:
        """A bank of such experts."""
        bank = FFNBank(self.d_model, [len(units) for units in experts], self.bank.activation, self.glu)
        bank = bank.to(experts[0].device, experts[0].dtype)
        parts = [units.split(self.d_model, dim=1) for units in experts]
        with torch.no_grad():
            bank.w_in.weight.copy_(torch.cat([matrix for *inside, _ in parts for matrix in inside]))
            bank.w_out.weight.copy_(torch.cat([out for *_, out in parts]))
        return bank
