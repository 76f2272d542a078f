"""A trained feed-forward network as a list of hidden units, to be dealt to experts and gathered again."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.experts import DenseMLP, SharedExpert
from moestro.ops.activations import ACTIVATIONS
from moestro.ops.activations import activation as find


@dataclass(frozen=True)
class Network:
    """FFN(x) = sum over units u of down_u h_u(x) + out_bias, h_u = act(gate_u x + gate_bias_u) (up_u x + up_bias_u), or
    act(up_u x + up_bias_u) without a gate. Row u of every matrix, `down` included, belongs to unit u."""

    activation: str
    up: Float[Tensor, "w d"]
    down: Float[Tensor, "w d"]
    gate: Float[Tensor, "w d"] | None = None
    up_bias: Float[Tensor, "w"] | None = None
    gate_bias: Float[Tensor, "w"] | None = None
    out_bias: Float[Tensor, "d"] | None = None

    @property
    def d_model(self) -> int:
        return self.up.shape[1]

    @property
    def width(self) -> int:
        return len(self.up)

    @property
    def glu(self) -> bool:
        return self.gate is not None

    @property
    def biased(self) -> bool:
        """Whether hidden units have biases."""
        return self.up_bias is not None or self.gate_bias is not None

    def hidden(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t w"]:
        """h_u of every token and unit."""
        act = find(self.activation).forward
        up = _affine(x, self.up, self.up_bias)
        return act(up) if self.gate is None else act(_affine(x, self.gate, self.gate_bias)) * up

    def __call__(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
        y = self.hidden(x) @ self.down
        return y if self.out_bias is None else y + self.out_bias

    def take(self, index: Int[Tensor, "m"]) -> Self:
        """Unit j is the old unit `index[j]`, or one of zeros, which adds nothing, for -1."""
        there, place = index >= 0, index.clamp(min=0)

        def rows(tensor: Tensor) -> Tensor:
            kept = tensor[place]
            return torch.where(there.view(-1, *[1] * (kept.ndim - 1)), kept, torch.zeros_like(kept))

        return self.mapped(rows)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The network with `change` made to every tensor that has a row for each unit."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        each = {name: value for name, value in named.items() if isinstance(value, Tensor) and name != "out_bias"}
        return replace(self, **{name: change(value) for name, value in each.items()})

    def biases(self) -> Float[Tensor, "w b"]:
        """The biases of every unit, gate before up; zeros where one of two is missing."""
        zeros = self.up.new_zeros(self.width)
        up = zeros if self.up_bias is None else self.up_bias
        if not self.glu:
            return up[:, None]
        return torch.stack([zeros if self.gate_bias is None else self.gate_bias, up], dim=1)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def concatenated(parts: list[Network]) -> Network:
    """The units of several networks of one kind, one after the other; the output bias is that of the first."""
    first = parts[0]
    joined = {}
    for field in fields(Network):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor) and field.name != "out_bias":
            joined[field.name] = torch.cat(values)
    return replace(first, **joined)


@torch.no_grad()
def of_expert(expert: SharedExpert | DenseMLP) -> Network:
    """The weights of a dense layer's network, or of a shared expert; views of its parameters. Dropout is left out.

    Raises: ValueError for a network of another library whose activation we do not have, or whose output is gated.
    """
    if isinstance(expert, DenseMLP):
        return _of_mlp(expert)
    w_in, w_out, b_in = expert.w_in.weight.detach(), expert.w_out.weight.detach(), expert.w_in.bias
    parts = w_in.chunk(2) if expert.glu else (None, w_in)
    biases = (None, None) if b_in is None else b_in.detach().chunk(2) if expert.glu else (None, b_in.detach())
    out_bias = None if expert.w_out.bias is None else expert.w_out.bias.detach()
    return Network(expert.activation, parts[1], w_out.T, parts[0], biases[1], biases[0], out_bias)


def _of_mlp(expert: DenseMLP) -> Network:
    from moestro.hf.experts import activation_name

    m, name = expert.matrices(), activation_name(expert.activation)
    if name is None or expert.weight is not None:
        raise ValueError(f"activation {expert.activation} of {type(expert.up).__name__} layers: allowed are {ours()}")
    biases = [None if bias is None else bias.detach() for bias in (m.up_bias, m.gate_bias, m.down_bias)]
    gate = None if m.gate is None else m.gate.detach()
    return Network(name, m.up.detach(), m.down.detach().T, gate, *biases)


def ours() -> str:
    """Names of the activations that we have."""
    return ", ".join(ACTIVATIONS)


@torch.no_grad()
def into_expert(dense: Network, expert: SharedExpert | DenseMLP) -> None:
    """Copy the weights into a network of the same sizes."""
    if isinstance(expert, DenseMLP):
        m = expert.matrices()
        pairs = [(m.gate, dense.gate), (m.up, dense.up), (m.down, dense.down.T), (m.gate_bias, dense.gate_bias)]
        for parameter, value in [*pairs, (m.up_bias, dense.up_bias), (m.down_bias, dense.out_bias)]:
            if parameter is not None and value is not None:
                parameter.copy_(value)
        return
    parts = [dense.up] if dense.gate is None else [dense.gate, dense.up]
    expert.w_in.weight.copy_(torch.cat(parts))
    expert.w_out.weight.copy_(dense.down.T)
    if expert.w_in.bias is not None:
        expert.w_in.bias.copy_(dense.biases().T.flatten())
        expert.w_out.bias.copy_(torch.zeros_like(expert.w_out.bias) if dense.out_bias is None else dense.out_bias)
