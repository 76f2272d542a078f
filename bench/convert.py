"""What computing k of N experts of a split network saves beside the dense layer that it was made of, on this CPU.

Forward passes, routing included: many tokens, and single ones as in decoding, other ones every time. FactorLLM's layer
(TinyLlama: d = 2048, 5632 hidden units, 4 experts) and a smaller one; k / N of the FLOPs is what there is to gain at
most. Beside them the dense layer here, and the same network as transformers runs it. Nothing is timed unless
those agree, and all experts with gates of 1 give the dense output.

    python -m bench.convert [--quick] [--json PATH]
"""

import argparse
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from bench.harness import Row, agree, arguments, clock, compare, report
from moestro.convert.layers import every_expert
from moestro.convert.network import of_expert
from moestro.convert.seen import Seen
from moestro.convert.split import Split
from moestro.experts.widths import equal
from moestro.layers import DenseFFN, MoELayer

N_EXPERTS, CHOSEN = 4, (1, 2)
DENSE, STOCK = "the dense layer", "LlamaMLP (transformers)"


@dataclass(frozen=True)
class Shape:
    """One dense layer."""

    d: int
    width: int

    def layers(self, seed: int) -> tuple[DenseFFN, dict[int, MoELayer]]:
        """The dense layer, and its split for every k."""
        torch.manual_seed(seed)
        dense = DenseFFN(self.d, self.width)
        seen = Seen(of_expert(dense.expert), torch.randn(8, self.d), seed)

        def widths(total: int, importance: Tensor) -> list[int]:
            return equal(N_EXPERTS, total)

        return dense, {k: Split(widths, k, gate="hard")(seen).layer for k in CHOSEN}


def llama_mlp(dense: DenseFFN) -> LlamaMLP:
    """The same network, same weights, as transformers runs it."""
    network = of_expert(dense.expert)
    mlp = LlamaMLP(LlamaConfig(hidden_size=network.d_model, intermediate_size=network.width))
    mlp.load_state_dict(
        {"gate_proj.weight": network.gate, "up_proj.weight": network.up, "down_proj.weight": network.down.T}
    )
    return mlp


def race(shape: Shape, tokens: int, options: argparse.Namespace) -> list[Row]:
    """The dense layer and its splits on as many tokens at a time."""
    dense, splits = shape.layers(options.seed)
    stock = llama_mlp(dense)
    batches = [torch.randn(tokens, shape.d) for _ in range(16)]
    for layer in splits.values():
        with torch.no_grad(), every_expert([layer]):
            agree("all experts", layer(batches[0])[0], dense(batches[0])[0], 1e-5)
    with torch.no_grad():
        agree(STOCK, stock(batches[0]), dense(batches[0])[0], 1e-5)
    rows = []
    for k, layer in splits.items():
        turns = {"ours": cycle(batches), DENSE: cycle(batches), STOCK: cycle(batches)}
        contestants = {"ours": lambda layer=layer, turns=turns: layer(next(turns["ours"]))}
        contestants[DENSE] = lambda turns=turns: dense(next(turns[DENSE]))
        contestants[STOCK] = lambda turns=turns: stock(next(turns[STOCK]))
        with torch.no_grad():
            times = clock(contestants, 10 if options.quick else 20, warm_up=3)
        rows += compare(
            f"d={shape.d} width={shape.width} T={tokens}",
            f"forward, {k} of {N_EXPERTS}",
            times,
            "us" if tokens == 1 else "ms",
        )
    return rows


def main() -> None:
    options = arguments(__doc__)
    shapes = [Shape(256, 704)] if options.quick else [Shape(512, 1536), Shape(2048, 5632)]
    rows = [row for shape in shapes for tokens in (1024, 1) for row in race(shape, tokens, options)]
    report("bench/convert.py", rows, options)


if __name__ == "__main__":
    main()
