"""What is collected of one layer's experts while text goes through a model: sums in float64, and a sample of tokens."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.compress.feed_forward import FeedForward
from moestro.layers.moe import MoELayer
from moestro.routing import Routing


@dataclass
class Observed:
    """Sums over the tokens of a calibration text, for every expert of one layer.

    `rows` [e]: tokens routed to it. `gates` [e]: sum of their gates. `norms` [e] and `gated_norms` [e]: sums of the
    norm of its output, and of that times its share of the token's gates, over those tokens. `together` [e e]: tokens
    that both experts got. `outputs` [e d]: sum of its outputs over all tokens, its own or not, where `everywhere`.
    `entropy`: sum of the entropy of the router's probabilities, nats, where there are logits. `input_moments_E` [d d]
    and `hidden_moments_E` [w w]: sums of x x' of the inputs of expert E's matrices, over its tokens, where asked for.
    `inputs` [n d]: the layer's inputs of sampled tokens; `keys` [n] are what the sample was drawn by."""

    n_experts: int
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    inputs: Tensor | None = None
    keys: Tensor | None = None

    def __getattr__(self, name: str) -> Tensor:
        # only asked where no field has the name
        sums = self.__dict__.get("sums", {})
        if name not in sums:
            raise AttributeError(f"{name!r} was not collected; there are {', '.join(sums) or 'no sums yet'}")
        return sums[name]

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum."""
        value = value.detach().to("cpu", torch.float64)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    @torch.no_grad()
    def observe(self, layer: MoELayer, x: Float[Tensor, "t d"], routing: Routing, everywhere: bool = False) -> None:
        """Add the tokens of one batch: the layer's inputs, and where they went."""
        gates, met = gates_of(routing)
        self.tokens += len(x)
        self.add("rows", met.sum(0))
        self.add("gates", gates.double().sum(0))
        self.add("together", met.double().T @ met.double())
        if routing.logits is not None:
            self.add("entropy", entropy(routing.logits).sum())
        shares = gates.double() / gates.double().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        norms, gated, outputs = [], [], []
        for expert in range(self.n_experts):
            here = met[:, expert]
            answers = expert_output(layer, expert, x if everywhere else x[here]).double()
            outputs.append(answers.sum(0))
            size = answers.norm(dim=-1)
            size = size[here] if everywhere else size
            norms.append(size.sum())
            gated.append((shares[here, expert] * size).sum())
        self.add("norms", torch.stack(norms))
        self.add("gated_norms", torch.stack(gated))
        if everywhere:
            self.add("outputs", torch.stack(outputs))

    @torch.no_grad()
    def observe_moments(self, layer: MoELayer, x: Float[Tensor, "t d"], routing: Routing) -> None:
        """Add the second moments of what every expert's matrices multiplied."""
        met, bank = gates_of(routing)[1], FeedForward.of(layer)
        for expert in range(self.n_experts):
            rows = x[met[:, expert]]
            hidden = bank.hidden(bank.matrices(expert)[0], rows).double()
            rows = rows.double()
            self.add(f"input_moments_{expert}", rows.T @ rows)
            self.add(f"hidden_moments_{expert}", hidden.T @ hidden)

    def sample(self, x: Float[Tensor, "t d"], size: int, seed: int, batch: int) -> None:
        """Keep `size` tokens of all that were offered, each as likely; which ones depends on seed and places alone, so
        they are the same tokens in every layer."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + batch)
        keys = torch.rand(len(x), generator=generator, dtype=torch.float64)
        rows = x.detach().cpu()
        if self.keys is not None and self.inputs is not None:
            keys, rows = torch.cat([self.keys, keys]), torch.cat([self.inputs, rows])
        kept = keys.argsort(stable=True)[:size].sort().values
        self.keys, self.inputs = keys[kept], rows[kept]

    def state(self) -> dict[str, Tensor]:
        """Everything collected, as tensors."""
        more = {"inputs": self.inputs, "keys": self.keys, "tokens": torch.tensor(self.tokens)}
        return {**self.sums, **{name: value for name, value in more.items() if value is not None}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """What `state` gave."""
        state = dict(state)
        self.tokens = int(state.pop("tokens"))
        self.inputs, self.keys = state.pop("inputs", None), state.pop("keys", None)
        self.sums = state

    def unseen(self, least: int = 1) -> list[int]:
        """Experts that fewer than `least` tokens met: what is said of them is said of too little."""
        return (self.rows < least).nonzero().flatten().tolist()


def gates_of(routing: Routing) -> tuple[Float[Tensor, "t e"], Bool[Tensor, "t e"]]:
    """The gate of every expert for every token, and which of them computed it, gates of 0 included.

    Raises: ValueError where rows are mixtures of tokens.
    """
    meetings = routing.meetings()
    if meetings is None:
        raise ValueError(
            f"{type(routing).__name__} mixes tokens before experts see them: no expert has tokens of its own"
        )
    token, expert = meetings
    met = torch.zeros(routing.n_tokens, routing.n_experts, dtype=torch.bool, device=token.device)
    met[token, expert] = True
    return routing.dense().detach(), met


def entropy(logits: Float[Tensor, "t e"]) -> Float[Tensor, "t"]:
    """Entropy of the probabilities of the logits, nats."""
    logs = logits.double().log_softmax(-1)
    return -(logs.exp() * logs.clamp(min=torch.finfo(torch.float64).min)).sum(-1)


def expert_output(layer: MoELayer, expert: int, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """What one expert of the layer's banks answers to these tokens, its gate left out."""
    n = len(x)
    offsets = torch.zeros(layer.router.n_experts + 1, dtype=torch.int64, device=x.device)
    offsets[expert + 1 :] = n
    first, *others = (bank.run(x, offsets) for bank in layer.banks())
    return sum(others, first)
