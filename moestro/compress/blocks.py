"""Runs of decoder layers on recorded inputs: which candidates of neighbouring layers go together (MoE-I2's block-wise
refinement, arXiv:2411.01016, stage 1, step 4)."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from torch import Tensor, nn

from moestro.compress.applied import layer_number
from moestro.compress.masking import without
from moestro.compress.search import Subset
from moestro.data import Batch
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.layers.moe import MoELayer


@dataclass
class Recording:
    """What one decoder layer was called with, batch by batch: everything but its first argument, the hidden state,
    which is kept where a block begins, and its output where one ends."""

    layer: nn.Module
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def run(self, hidden: Tensor, batch: int) -> Tensor:
        """The layer on another hidden state of that batch."""
        arguments, keywords = self.rest[batch]
        return state_of(self.layer(hidden, *arguments, **keywords))


@dataclass(frozen=True)
class Block:
    """Consecutive decoder layers, the names of the mixture layers in them, in order, and which tokens of every batch
    count."""

    decoders: tuple[Recording, ...]
    mixtures: tuple[str, ...]
    counted: list[Tensor] = field(default_factory=list)


def state_of(output: Any) -> Tensor:
    """The hidden state among what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output


def blocks_of(model: nn.Module, batches: Iterable[Batch], size: int = 3) -> list[Block]:
    """The model's mixture layers in blocks of `size`, the last one shorter where they do not come out even, with what
    their decoder layers were given and answered on the batches. A decoder layer without experts belongs to the block
    before it. Masks and positions that layers share are kept once."""
    if size < 1:
        raise ValueError(f"size={size} mixture layers in a block, allowed: at least 1")
    names = list(model.moe_layers())  # type: ignore[operator]
    decoders = model.decoder_layers()  # type: ignore[operator]
    starts = [layer_number(name) for name in names[::size]]
    ends = [*starts[1:], layer_number(names[-1]) + 1]
    blocks = []
    for place, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        recordings = tuple(Recording(layer) for layer in decoders[start:stop])
        blocks.append(Block(recordings, tuple(names[place * size : (place + 1) * size])))
    _record(model, batches, blocks)
    return blocks


def _record(model: nn.Module, batches: Iterable[Batch], blocks: Sequence[Block]) -> None:
    """Fill the recordings, one pass over the text."""
    with ExitStack() as stack:
        for block in blocks:
            for place, recording in enumerate(block.decoders):
                ends = place == 0, place == len(block.decoders) - 1
                handle = recording.layer.register_forward_hook(_hook(recording, *ends), with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        for batch in batches:
            score(model, batch, "fp32")
            for block in blocks:
                block.counted.append(batch.keep)


def _hook(recording: Recording, begins: bool, ends: bool) -> Any:
    def note(_layer: nn.Module, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
        recording.rest.append((arguments[1:], keywords))
        if begins:
            recording.inputs.append(arguments[0])
        if ends:
            recording.outputs.append(state_of(output))

    return note


def block_error(
    block: Block, layers: Mapping[str, MoELayer], choice: Sequence[Subset], inputs: Sequence[Tensor] | None = None
) -> tuple[float, list[Tensor]]:
    """||the block's last hidden states - the same without the chosen experts||_F over the tokens that count, and the
    states. The block starts from `inputs`, its recorded ones where they are None; norms, attention, residuals and
    shared experts take part."""
    first, last = block.decoders[0], block.decoders[-1]
    squares, states = 0.0, []
    with ExitStack() as stack:
        for name, experts in zip(block.mixtures, choice, strict=True):
            stack.enter_context(without(layers[name], experts))
        for recording in block.decoders:
            stack.enter_context(evaluating(recording.layer))
        for number, clean in enumerate(last.outputs):
            hidden = (first.inputs if inputs is None else inputs)[number]
            for recording in block.decoders:
                hidden = recording.run(hidden, number)
            change = (hidden - clean)[block.counted[number].to(clean.device)]
            squares += float(change.double().square().sum())
            states.append(hidden)
    return squares**0.5, states


def refine(
    model: nn.Module,
    blocks: Sequence[Block],
    candidates: Mapping[str, Sequence[Subset]],
    propagate: bool = False,
) -> dict[str, Subset]:
    """For every mixture layer one of its candidates: block after block, the joint choice of the least error of the
    block's last hidden states; of equal ones the first, candidates in their order.

    Each block starts from the unpruned model's hidden states, or with `propagate` from those that the blocks before it
    leave; what the paper does is not known to us.
    """
    layers: dict[str, MoELayer] = model.moe_layers()  # type: ignore[operator]
    chosen: dict[str, Subset] = {}
    inputs: Sequence[Tensor] | None = None
    for block in blocks:
        choices = product(*(candidates[name] for name in block.mixtures))
        found = [(block_error(block, layers, choice, inputs)[0], place, choice) for place, choice in enumerate(choices)]
        best = min(found)[2]
        chosen |= dict(zip(block.mixtures, best, strict=True))
        if propagate:
            inputs = block_error(block, layers, best, inputs)[1]
    return chosen
