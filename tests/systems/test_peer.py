"""The PEER layer against `tests/reference/peer.py`, in float64: outputs and every single gradient.

Exact checks of arXiv:2407.04153 as our specification numbers them, and where each is tested:
 1 product keys = brute force               test_peer_retrieval.py
 2 index of a pair                          test_peer_retrieval.py
 3 layer = dense mixture over all N         here: test_layer_equals_*
 4 k = 1                                    here: test_one_expert_*
 5 permuting sub-keys with their experts    here: test_permuting_* (all N chosen at once cannot be: k <= sqrt N < N)
 6 gates, sum over heads                    here: test_gates_*, test_copied_heads_*
 7 fast paths, duplicates, unused rows      here: test_layer_equals_*, test_duplicates_*, test_checkpointing_*
 8 query batch norm                         test_peer_query_norm.py; generation with a cache: test_transformer.py
10 usage and unevenness                     test_peer_metrics.py
11 parameters and FLOPs                     test_peer_counts.py
12 output scale at initialisation           test_peer_counts.py
13 bfloat16, ties, state dict               test_peer_edges.py; ties: test_peer_retrieval.py
Gated neurons, plain values, dense branches beside them: test_peer_modes.py; shared values and inserted layers:
test_memory_plus.py; experts of several widths: test_peer_uneven.py; weights of a public package: test_peer_pytorch.py.
Elsewhere: row-sparse gradients (9), tests/train/test_row_training.py, and lazy Adam, test_row_adamw.py; Triton's paths
(7), tests/ops/test_triton_peer.py; tables split by rows and by columns (13), tests/parallel/test_tables_over_ranks.py.
Queries have no bias: the paper gives none.
"""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moestro.experts import SingletonBank
from moestro.layers import ActiveRows, MoELayer
from moestro.ops import backend
from moestro.routing import SparseRouting
from tests.reference import peer
from tests.systems.peer_layers import (
    D,
    Gate,
    Norm,
    Twin,
    bank_of,
    grad,
    make_layer,
    random,
    router_of,
    set_running_statistics,
)  # fmt: skip
from tests.tolerances import FLOAT64

close = torch.testing.assert_close


def assert_layer_equals_reference(layer: MoELayer, x: Tensor) -> None:
    """Output, choices, gates, and the gradient of x, queries, norm, keys and each expert's u and v."""
    twin, cotangent = Twin(layer), random(*x.shape)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, (trace,) = layer(x_ours)
    y_theirs, gates, index = twin.forward(x_theirs)
    close(y, y_theirs, **FLOAT64)
    ids, weight = trace.routing.matrix()
    assert ids.tolist() == [[i for head in token for i in head] for token in index]
    close(weight, gates.flatten(1), **FLOAT64)

    (y * cotangent).sum().backward()
    (y_theirs * cotangent).sum().backward()
    close(x_ours.grad, x_theirs.grad, **FLOAT64)
    for name, parameter in router_of(layer).named_parameters():
        close(parameter.grad, twin.weights[name].grad, **FLOAT64, msg=lambda m, name=name: f"{name}: {m}")
    bank = bank_of(layer)
    for table, rows in ((bank.up, twin.up), (bank.down, twin.down)):
        for e, row in enumerate(rows):
            if row.grad is None:
                assert torch.count_nonzero(grad(table)[e]) == 0, f"expert {e} was not chosen and has a gradient"
            else:
                close(grad(table)[e], row.grad, **FLOAT64, msg=lambda m, e=e: f"expert {e}: {m}")


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "relu"])
@pytest.mark.parametrize("shared_keys", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "qk_rms", "none"])
def test_layer_equals_reference(norm: Norm, shared_keys: bool, gate: Gate, how: str) -> None:
    layer = make_layer(shared_keys=shared_keys, norm=norm, gate=gate)
    with backend.force(how):
        assert_layer_equals_reference(layer, random(7, D))


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "none"])
def test_every_activation_equals_reference(activation: str, how: str) -> None:
    with backend.force(how):
        assert_layer_equals_reference(make_layer(activation=activation), random(6, D))


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize(("side", "heads", "k", "d_key"), [(2, 1, 2, 2), (3, 4, 3, 4), (5, 1, 2, 8), (6, 3, 5, 2)])
def test_shapes_equal_reference(side: int, heads: int, k: int, d_key: int, how: str) -> None:
    with backend.force(how):
        assert_layer_equals_reference(make_layer(side, heads, k, d_key, norm="none"), random(5, D))


@pytest.mark.parametrize("how", ["fused", "reference"])
def test_layer_equals_reference_in_evaluation(how: str) -> None:
    layer = make_layer()
    set_running_statistics(layer)
    with backend.force(how):
        assert_layer_equals_reference(layer.eval(), random(7, D))


def test_layer_with_recorded_rows_equals_reference() -> None:
    """The definition that every bank has (`run` on gathered rows), not the fetch by id."""
    fast = make_layer()
    layer = MoELayer(fast.router, [fast.bank], record=ActiveRows())
    x = random(6, D)
    y, (trace,) = layer(x)
    close(y, Twin(layer).forward(x)[0], **FLOAT64)
    assert trace.rows is not None and trace.rows.shape == (6 * 2 * 3, D)


@pytest.mark.parametrize("shared_keys", [True, False])
def test_layer_equals_dense_mixture_of_all_experts(shared_keys: bool) -> None:
    """Check 3: all N experts computed and masked, outputs and all gradients."""
    layer = make_layer(shared_keys=shared_keys, norm="none")
    router, bank = router_of(layer), bank_of(layer)
    x = random(8, D).requires_grad_()
    first, second = router.keys.squeeze(1) if shared_keys else router.keys
    dense = peer.dense_mixture(x, x @ router.query.T, first, second, bank.up, bank.down, heads=2, k=3)
    y, _ = layer(x)
    close(y, dense, **FLOAT64)
    wanted, cotangent = [x, *layer.parameters()], random(8, D)
    ours, theirs = torch.autograd.grad(y, wanted, cotangent), torch.autograd.grad(dense, wanted, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, **FLOAT64)


def test_one_expert_with_gate_one_is_one_neuron() -> None:
    """Check 4 (Eq. 8): y = v sigma(u . x)."""
    bank = SingletonBank(D, 9).double()
    expert = torch.tensor([[3], [8], [3], [0]])
    x = random(4, D)
    y = bank(x, SparseRouting.from_topk(expert, torch.ones(4, 1, dtype=torch.float64), 9))
    for t, e in enumerate(expert.flatten().tolist()):
        close(y[t], bank.down[e] * torch.nn.functional.gelu(bank.up[e] @ x[t]), **FLOAT64)


def test_one_expert_under_softmax_is_refused() -> None:
    """Check 4: the gate would be the constant 1, and queries and keys would never learn."""
    with pytest.raises(ValueError, match="top_k=1 with gate='softmax'.*no gradient.*gate='sigmoid'"):
        make_layer(k=1)
    scores = random(1).requires_grad_()
    (derivative,) = torch.autograd.grad(peer.gate(scores), scores)
    assert torch.count_nonzero(derivative) == 0


@pytest.mark.parametrize("gate", ["sigmoid", "relu"])
def test_one_expert_under_other_gates_learns_where_to_look(gate: Gate) -> None:
    layer = make_layer(k=1, gate=gate)
    y, _ = layer(random(9, D))
    y.square().sum().backward()
    assert torch.count_nonzero(grad(router_of(layer).query)) > 0
    assert torch.count_nonzero(grad(router_of(layer).keys)) > 0


@pytest.mark.parametrize("axis", [0, 1])
def test_permuting_one_side_of_keys_with_its_experts_changes_nothing(axis: int) -> None:
    """Check 5."""
    layer, x = make_layer(side=4, k=4, heads=1, norm="none"), random(20, D)
    y, (trace,) = layer(x)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        router_of(layer).keys[axis] = router_of(layer).keys[axis][:, order]
        for table in (bank_of(layer).up, bank_of(layer).down):
            table.copy_(table.view(4, 4, D).index_select(axis, order).flatten(0, 1))
    permuted, (other,) = layer(x)
    close(permuted, y, **FLOAT64)
    assert not torch.equal(trace.routing.expert, other.routing.expert)


def test_gates_sum_to_one_in_each_head() -> None:
    _, (trace,) = make_layer(heads=3)(random(10, D))
    _, weight = trace.routing.matrix()
    close(weight.view(10, 3, 3).sum(-1), torch.ones(10, 3, dtype=torch.float64), **FLOAT64)


def test_copied_heads_give_a_multiple_of_one() -> None:
    """Check 6: the layer is a sum over heads, neither a mean nor a concatenation."""
    one, three = make_layer(heads=1, norm="none"), make_layer(heads=3, norm="none")
    state = one.state_dict()
    three.load_state_dict(state | {"router.query": state["router.query"].repeat(3, 1)})
    x = random(10, D)
    close(three(x)[0], 3 * one(x)[0], **FLOAT64)


@pytest.mark.parametrize("how", ["fused", "reference"])
def test_duplicates_of_an_expert_inside_a_token_accumulate(how: str) -> None:
    """Check 7: across heads; and rows that nobody chose have exactly zero gradient."""
    bank = SingletonBank(D, 6).double()
    ids = torch.tensor([[2, 2, 4], [2, 5, 5]])
    weight = random(2, 3).requires_grad_()
    x, cotangent = random(2, D).requires_grad_(), random(2, D)
    with backend.force(how):
        y = bank(x, SparseRouting.from_topk(ids, weight, 6))
        y.backward(cotangent)
    up, down = ([row.detach().clone().requires_grad_() for row in table] for table in (bank.up, bank.down))
    for t in range(2):
        y_t = sum((weight[t, c] * peer.expert(x[t], up[i], down[i]) for c, i in enumerate(ids[t].tolist())), x[t] * 0)
        close(y[t], y_t, **FLOAT64)
        y_t.backward(cotangent[t], inputs=[*up, *down])
    for e in range(6):
        for table, row in ((bank.up, up[e]), (bank.down, down[e])):
            if e in (2, 4, 5):
                close(grad(table)[e], row.grad, **FLOAT64)
            else:
                assert torch.count_nonzero(grad(table)[e]) == 0


def test_gradients_of_the_fused_pass_by_finite_differences() -> None:
    ids = torch.tensor([[2, 2, 4], [2, 5, 5]])
    bank = SingletonBank(3, 6).double()

    def call(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        routing = SparseRouting.from_topk(ids, weight, 6)
        return torch.func.functional_call(bank, {"up": up, "down": down}, (x, routing))

    inputs = random(2, 3), random(2, 3), bank.up.detach(), bank.down.detach()
    assert torch.autograd.gradcheck(call, tuple(v.clone().requires_grad_() for v in inputs))


def test_checkpointing_changes_no_gradient_and_no_statistic() -> None:
    """Checks 7 and 8: the forward that runs twice counts nothing."""
    layer, x, cotangent = make_layer(), random(9, D).requires_grad_(), random(9, D)
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    wanted = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x)[0], wanted, cotangent)
    recomputed = torch.autograd.grad(checkpoint(lambda v: layer(v)[0], x, use_reentrant=False), wanted, cotangent)
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)
    assert buffers and all(torch.equal(buffer, buffers[name]) for name, buffer in layer.named_buffers())
