"""Block-wise refinement: candidates of neighbouring layers tried together, through the true decoder layers."""

import itertools

import pytest
import torch

from moestro.compress.blocks import block_error, blocks_of, refine
from moestro.compress.masking import without
from tests.compress.models import decoder, text

CANDIDATES = [(0,), (2,), (4, 5)]


def last_state(model, batches, choice, after):
    """Hidden states after one decoder layer of the whole model, without the chosen experts."""
    found = []
    handle = model.blocks[after].register_forward_hook(lambda _m, _a, output: found.append(output[0]))
    layers = list(model.moe_layers().values())
    with torch.no_grad():
        masks = [without(layer, experts) for layer, experts in zip(layers, choice, strict=False)]
        for mask in masks:
            mask.__enter__()
        for batch in batches:
            model(batch.tokens, documents=batch.documents, keep=batch.keep)
        for mask in masks:
            mask.__exit__(None, None, None)
    handle.remove()
    return torch.cat([state[batch.keep] for state, batch in zip(found, batches, strict=True)])


def test_blocks_cover_the_model_and_dense_layers_belong_to_the_block_before():
    model = decoder("mdmmdm")
    found = blocks_of(model, text(), size=2)
    assert [block.mixtures for block in found] == [("blocks.0.ffn", "blocks.2.ffn"), ("blocks.3.ffn", "blocks.5.ffn")]
    assert [len(block.decoders) for block in found] == [3, 3]
    assert [len(block.mixtures) for block in blocks_of(model, text(), size=3)] == [3, 1]
    with pytest.raises(ValueError, match="at least 1"):
        blocks_of(model, text(), size=0)


@pytest.mark.parametrize("layers", ["mmm", "mdm"])
def test_the_error_of_a_block_is_that_of_the_whole_model(layers):
    """In the first block, which starts from the embedding, at the layer where it ends."""
    model, batches = decoder(layers), text()
    (block,) = blocks_of(model, batches)
    clean = last_state(model, batches, (), 2)
    mixtures = model.moe_layers()
    for choice in itertools.islice(itertools.product(CANDIDATES, repeat=len(block.mixtures)), 5):
        error, states = block_error(block, mixtures, choice)
        found = torch.cat([state[batch.keep] for state, batch in zip(states, batches, strict=True)])
        torch.testing.assert_close(found, last_state(model, batches, choice, 2))
        assert error == pytest.approx(float((found - clean).norm()), rel=1e-9)
        assert not torch.allclose(found, clean)
    assert block_error(block, mixtures, [()] * len(block.mixtures))[0] == 0


def test_the_choice_is_the_best_of_all_joint_ones():
    model, batches = decoder("mmm"), text(1)
    candidates = dict.fromkeys(model.moe_layers(), CANDIDATES)
    chosen = tuple(refine(model, blocks_of(model, batches), candidates).values())
    (block,) = blocks_of(model, batches)
    layers = model.moe_layers()
    errors = {choice: block_error(block, layers, choice)[0] for choice in itertools.product(CANDIDATES, repeat=3)}
    assert len(errors) == 27 and errors[chosen] == min(errors.values())
    # no worse than every layer's own best, and for some layer another one
    alone = tuple(
        min(CANDIDATES, key=lambda c, at=at: block_error(block, layers, [c if at == i else () for i in range(3)])[0])
        for at in range(3)
    )
    assert errors[chosen] <= errors[alone]


def test_one_candidate_is_the_choice_and_blocks_of_one_choose_alone():
    model, batches = decoder("mmm"), text()
    names = list(model.moe_layers())
    one = {name: [CANDIDATES[at]] for at, name in enumerate(names)}
    assert refine(model, blocks_of(model, batches), one) == {name: CANDIDATES[at] for at, name in enumerate(names)}
    singles = blocks_of(model, batches, size=1)
    chosen = refine(model, singles, dict.fromkeys(names, CANDIDATES))
    for block in singles:
        (name,) = block.mixtures
        errors = [block_error(block, model.moe_layers(), [candidate])[0] for candidate in CANDIDATES]
        assert chosen[name] == CANDIDATES[errors.index(min(errors))]


def test_propagated_blocks_start_from_what_pruned_ones_leave():
    model, batches = decoder("mmmm"), text()
    names = list(model.moe_layers())
    candidates = {name: CANDIDATES if at > 1 else CANDIDATES[:1] for at, name in enumerate(names)}
    blocks, layers = blocks_of(model, batches, size=2), model.moe_layers()
    chosen = refine(model, blocks, candidates, propagate=True)
    inputs = block_error(blocks[0], layers, [CANDIDATES[0]] * 2)[1]
    errors = {c: block_error(blocks[1], layers, c, inputs)[0] for c in itertools.product(CANDIDATES, repeat=2)}
    assert errors[chosen[names[2]], chosen[names[3]]] == min(errors.values())
    whole = last_state(model, batches, tuple(chosen.values()), 3)
    states = block_error(blocks[1], layers, [chosen[names[2]], chosen[names[3]]], inputs)[1]
    found = torch.cat([state[batch.keep] for state, batch in zip(states, batches, strict=True)])
    torch.testing.assert_close(found, whole)
