"""The PEER layer beside the public PEER-pytorch package (gather and einsum), on this machine.

Forward, and forward + backward, routing included on both sides, with the same weights; the package's default of one
expert a head is switched off. The MoE layer's rows are in `bench.hmoe`, PEER's training step and other sizes in
`bench.peer`.

    python -m bench.layers [--quick] [--json PATH]
"""

import torch

from bench.experts import gradients
from bench.harness import Row, agree, arguments, race, report, weigh
from bench.peer import PACKAGE, Shape, pair


def peer_rows(quick: bool) -> list[Row]:
    """Our PEER layer with the weights of the public package's."""
    shape = Shape(256, 256, 128, half=64) if quick else Shape(512, 512, 512)
    ours, theirs = pair(shape, sparse_gradients=False)
    x = torch.randn(shape.tokens, shape.d, requires_grad=True)
    run_ours, run_theirs = (lambda: ours(x)[0]), (lambda: theirs(x[None])[0])
    agree("PEER, output", run_ours(), run_theirs(), 1e-4)
    both_ours, both_theirs = (
        gradients(run_ours, [x, *ours.parameters()]),
        gradients(run_theirs, [x, *theirs.parameters()]),
    )
    agree("PEER, gradient of the input", both_ours()[0], both_theirs()[0], 1e-3)
    rounds = 5 if quick else 7
    with torch.no_grad():
        rows = race(shape.case, "forward", run_ours, {PACKAGE: run_theirs}, rounds)
    rows += race(shape.case, "forward + backward", both_ours, {PACKAGE: both_theirs}, rounds)
    return rows + weigh(shape.case, run_ours, {PACKAGE: run_theirs})


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    report("bench/layers.py", peer_rows(options.quick), options)


if __name__ == "__main__":
    main()
