"""Made-up routing for tests: experts of Zipf's popularity that come again, predictions sometimes right."""

import torch

from moestro.offload.trace import Header, Step, Trace


def made_up(
    seed: int = 0,
    n_layers: int = 3,
    n_experts: int = 8,
    top_k: int = 2,
    tokens: int = 40,
    sequences: int = 2,
    depth: int = 2,
    right: float = 0.7,
    size: tuple[int, int] = (8, 2),
) -> Trace:
    """A trace of one-token passes; predictions of the next `depth` layers, right with probability `right`^distance."""
    draw = torch.Generator().manual_seed(seed)
    popularity = 1 / torch.arange(1, n_experts + 1).double()
    steps = []
    for sequence in range(sequences):
        order = [torch.randperm(n_experts, generator=draw) for _ in range(n_layers)]
        last = [torch.zeros(0, dtype=torch.long)] * n_layers
        for _ in range(tokens):
            chosen = []
            for layer in range(n_layers):
                fresh = order[layer][torch.multinomial(popularity, top_k, generator=draw)]
                again = len(last[layer]) and float(torch.rand(1, generator=draw)) < 0.5
                last[layer] = last[layer] if again else fresh
                weights = torch.rand(top_k, generator=draw, dtype=torch.float64).sort(descending=True).values + 0.01
                chosen.append((last[layer][None], weights[None]))
            for layer in range(n_layers):
                ahead = []
                for distance in range(1, min(depth, n_layers - 1 - layer) + 1):
                    ids, weights = chosen[layer + distance]
                    wrong = float(torch.rand(1, generator=draw)) > right**distance
                    ahead.append(((ids + 1) % n_experts if wrong else ids, weights))
                steps.append(Step(sequence, layer, *chosen[layer], tuple(ahead)))
    header = Header("made up", [[size[0]] * n_experts] * n_layers, [[size[1]] * n_experts] * n_layers, top_k)
    return Trace(header, steps)
