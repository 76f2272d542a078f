"""The decoder against `tests/reference/transformer.py` in float64, with each kind of feed-forward layer inside."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moestro.experts import FFNBank, quantize_banks
from moestro.layers import MoELayer
from moestro.model import Attention, Block, Cache, Transformer
from moestro.model.active import total_parameters
from moestro.objectives import ParameterPenalty, RouterEntropy
from moestro.ops import backend
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.routers import SlotRouter
from moestro.train.rules import QueryNormStatistics
from tests.conftest import ROOT
from tests.reference import transformer
from tests.systems.decoders import KINDS, LAYERS, D, Twin, V, decoder, tokens
from tests.systems.peer_layers import set_running_statistics
from tests.tolerances import FLOAT64

close = torch.testing.assert_close


def assert_same_gradients(model: Transformer, twin: Twin) -> None:
    for name, parameter in model.named_parameters():
        close(parameter.grad, twin.leaves[name].grad, **FLOAT64, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_all_gradients_equal_reference(kind: str) -> None:
    model = decoder(kind)
    twin, sequence, targets = Twin(model), tokens(1, 7), [3, -100, 0, 10, 5, 5, 1]
    output = model(sequence)
    logits = twin.forward(sequence[0].tolist())
    close(output.logits[0], logits, **FLOAT64)
    assert len(output.traces) == (0 if kind == "dense" else 1)
    loss = transformer.cross_entropy(logits, targets)
    ours = torch.nn.functional.cross_entropy(output.logits[0], torch.tensor(targets))
    close(ours, loss, **FLOAT64)
    ours.backward()
    loss.backward()
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("n_kv_heads", "head_dim"), [(4, 2), (2, 6), (1, 4)])
def test_attention_shapes_and_ties_equal_reference(n_kv_heads: int, head_dim: int, tied: bool) -> None:
    """As many key heads as heads, fewer, one; heads wider than d_model / n_heads; two sequences in a batch."""
    model = decoder("top2", n_kv_heads, head_dim, tied)
    twin, batch = Twin(model), tokens(2, 6)
    logits = torch.stack([twin.forward(sequence) for sequence in batch.tolist()])
    output = model(batch).logits
    close(output, logits, **FLOAT64)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    logits.backward(cotangent)
    assert_same_gradients(model, twin)
    assert len(list(model.parameters())) == len(twin.leaves) and ("head.weight" in twin.leaves) != tied


@pytest.mark.parametrize("kind", ["dense", "top_p"])
def test_packed_documents_equal_reference(kind: str) -> None:
    model, batch = decoder(kind), tokens(2, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 7]])
    logits = model(batch, documents=documents).logits
    twin = Twin(model)
    for row, sequence, ids in zip(logits, batch.tolist(), documents.tolist(), strict=True):
        close(row, twin.forward(sequence, ids), **FLOAT64)


def test_a_packed_document_gives_what_it_gives_alone() -> None:
    """Positions keep counting, but only their differences matter."""
    model, batch = decoder("top2"), tokens(1, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    packed = model(batch, documents=documents).logits
    close(packed[:, :3], model(batch[:, :3]).logits, **FLOAT64)
    close(packed[:, 3:], model(batch[:, 3:]).logits, **FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_right_changes_nothing(kind: str) -> None:
    model, batch = decoder(kind), tokens(1, 8)
    keep = torch.tensor([[True] * 5 + [False] * 3])
    padded, alone = model(batch, keep=keep), model(batch[:, :5])
    close(padded.logits[:, :5], alone.logits, **FLOAT64)
    for ours, theirs in zip(padded.traces, alone.traces, strict=True):
        assert ours.routing.n_tokens == theirs.routing.n_tokens == 5


def evaluated(kind: str) -> Transformer:
    model = decoder(kind)
    set_running_statistics(model)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_equals_reference(kind: str) -> None:
    model, batch = evaluated(kind), tokens(1, 6)
    close(model(batch).logits[0], Twin(model).forward(batch[0].tolist()), **FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_does_not_reach_the_past(kind: str) -> None:
    model, batch = evaluated(kind), tokens(2, 9)
    changed = batch.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    before, after = model(batch).logits, model(changed).logits
    close(after[:, :5], before[:, :5], rtol=0, atol=1e-12)
    assert (after[:, 5:] - before[:, 5:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "peer"])
def test_the_future_does_not_reach_the_past_in_training(kind: str) -> None:
    """Except through PEER's query statistics, as the paper has it (test_peer_query_norm.py)."""
    model, batch = decoder(kind), tokens(1, 9)
    changed = batch.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    close(model(changed).logits[:, :5], model(batch).logits[:, :5], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 3, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_equals_the_whole_sequence(kind: str, steps: list[int]) -> None:
    """One token at a time, batch of one, and in pieces: the same logits as all at once."""
    model, batch = evaluated(kind), tokens(1, 9)
    cache, pieces = Cache(), []
    for piece in batch.split(steps, dim=1):
        pieces.append(model(piece, cache=cache).logits)
    assert cache.length == 9
    close(torch.cat(pieces, dim=1), model(batch).logits, **FLOAT64)


def losses(model: Transformer, batch: torch.Tensor, rule: QueryNormStatistics) -> torch.Tensor:
    output = model(batch)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch.flatten())
    for trace in output.traces:
        rule.observe(trace)
        if trace.routing.logits is not None:
            loss = loss + 0.1 * ParameterPenalty()(trace) + 0.1 * RouterEntropy()(trace)
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_neither_loss_nor_gradients_nor_statistics(kind: str) -> None:
    """Activation checkpointing, losses on the routing and query statistics included, to the last bit."""
    model, batch, results = decoder(kind), tokens(2, 7), []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for recompute in (False, True):
        model.load_state_dict(start)
        model.recompute = recompute
        model.zero_grad()
        rule = QueryNormStatistics()
        loss = losses(model, batch, rule)
        loss.backward()
        rule.apply(1)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()}))
    (loss, gradients, buffers), (loss2, gradients2, buffers2) = results
    assert torch.equal(loss, loss2) and gradients.keys() == gradients2.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(gradients[name], gradients2[name]) for name in gradients)
    assert all(torch.equal(buffers[name], buffers2[name]) for name in buffers)
    assert (kind == "peer") == any(int(b) == 1 for name, b in buffers2.items() if name.endswith("updates"))


@pytest.mark.parametrize("kind", KINDS)
def test_flops_equal_a_counter(kind: str) -> None:
    """`computed` is every product that ran; `useful` leaves out the half of attention that causality masks."""
    model, batch = decoder(kind, n_kv_heads=4), tokens(2, 6)
    # the math kernel, because the counter sees its matrix products
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with backend.force("reference"), kernel, FlopCounterMode(display=False) as counter:
        output = model(batch)
    cost = model.flops(2, 6, output.traces).item()
    assert cost.computed == counter.get_total_flops()
    square = LAYERS * 4 * 2 * 6 * 6 * 8
    assert cost.computed - cost.useful == square * 5 / 12


@pytest.mark.parametrize("kind", ["dense", "top2", "peer"])
def test_expected_flops_equal_those_of_even_routing(kind: str) -> None:
    model = decoder(kind)
    output = model(tokens(4, 6))
    useful = model.flops(4, 6, output.traces).item().useful / 24
    expected = model.expected_token_flops(6)
    if kind == "top2":
        width = float(output.traces[0].active_width().mean())
        useful += 6 * D * (2 * 16 / 4 - width)
    assert abs(useful - expected) < 1e-6 * expected


def test_active_parameters_count_what_tokens_used() -> None:
    for kind in KINDS:
        model = decoder(kind)
        traces = model(tokens(2, 6)).traces
        total = sum(parameter.numel() for parameter in model.parameters())
        used = {"dense": 0.0, "peer": 2 * D * 6.0}
        stored = {"dense": 0, "peer": 2 * D * 16}
        width = float(traces[0].active_width().mean()) if traces else 0.0
        expected = total - stored.get(kind, 3 * D * 16) + used.get(kind, 3 * D * width)
        assert abs(model.active_parameters(traces) - expected) < 1e-6


def test_layers_that_look_at_other_tokens_are_refused() -> None:
    def blocks() -> list[Block]:
        return [Block(D, Attention(D, 2), MoELayer(SlotRouter(D, 3), [FFNBank(D, [2, 3, 4])]))]

    with pytest.raises(ValueError, match="blocks.0.ffn: SlotRouter looks at other tokens.*allow_non_causal"):
        Transformer(V, D, blocks())
    Transformer(V, D, blocks(), allow_non_causal=True)


def test_documents_and_cache_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="documents .* and cache .* exclude each other"):
        decoder()(tokens(1, 3), documents=torch.zeros(1, 3, dtype=torch.long), cache=Cache())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_heads": 3}, "d_model=8 is not a multiple of n_heads=3"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads=4 is not a positive multiple of n_kv_heads=3"),
        ({"n_heads": 8}, "head_dim=1, allowed: an even number"),
    ],
)
def test_impossible_heads_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(D, **arguments)


def test_tables_in_8_bits_count_as_the_numbers_that_they_stand_for() -> None:
    def model(kind: str) -> Transformer:
        layer = f"{{kind: moe, router: {{kind: product_key, heads: 2, top_k: 2, d_key: 8}}, branches: [{kind}]}}"
        recipe = load_recipe(ROOT / "recipes" / "peer.yaml", [f"model.layers={{2: {layer}}}", "objectives=[]"])
        return build_model(recipe, 64)

    narrow = model("{kind: quantized_singleton, n_experts: 64, sparse_gradients: true}")
    wide = model("{kind: singleton, n_experts: 64}")
    assert total_parameters(narrow) == total_parameters(wide) == sum(p.numel() for p in wide.parameters())
    assert total_parameters(narrow) > sum(p.numel() for p in narrow.parameters())
    expected = total_parameters(wide)
    quantize_banks(wide)
    assert total_parameters(wide) == expected
