"""Layers with a teacher, and routers that learn from it."""

import pytest
import torch

from moestro.convert.mixture import make_mixture
from moestro.convert.network import into_expert
from moestro.convert.routers import RouterSettings, expert_outputs, labels_of, teach_router
from moestro.layers import AllRows, DenseFFN, MoELayer, TaughtLayer
from moestro.objectives import RouterTarget
from moestro.objectives.router_target import label_experts, router_target_loss, target_distribution
from tests.convert.networks import TOKENS, D, W, drawn, network, seen, split
from tests.tolerances import FLOAT64

close = torch.testing.assert_close


def taught(gate: str = "straight_through", shared: int = 3, record: bool = True) -> TaughtLayer:
    made = split(seen(), n_experts=3, gate=gate, shared=shared)
    teacher = DenseFFN(D, W).double()
    into_expert(network(), teacher.expert)
    made.layer.record = AllRows() if record else None
    return TaughtLayer(made.layer, teacher)


@pytest.mark.parametrize("labels", ["subset", "expert_error", "projection"])
def test_the_objective_is_the_loss_of_the_labels(labels):
    """Rows and overheard rows put together are all experts' outputs; the shared expert's are taken off the target."""
    layer, x = taught(), drawn(TOKENS, D, seed=3).requires_grad_()
    y, (trace,) = layer(x)
    shared = layer.student.branches[1]
    close(trace.target, network()(x.detach()) - shared(x).detach(), **FLOAT64)
    loss = RouterTarget(labels)(trace)
    outputs = expert_outputs(layer.student, x.detach())
    chosen = label_experts(outputs, trace.target, 2, labels)
    close(loss, router_target_loss(trace.routing.logits, target_distribution(chosen)), **FLOAT64)
    # check 8: the teacher learns nothing, and neither do the experts from this loss
    loss.backward()
    names = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert names == {"student.router.score.weight", "student.router.score.bias"}
    assert not any(p.requires_grad for p in layer.teacher.parameters())


def test_the_target_of_the_loss_is_relative_to_the_scale_of_the_layer():
    layer = taught(shared=0)
    layer.student.router.select.scale = 1.9
    _, (trace,) = layer(drawn(TOKENS, D, seed=3))
    assert float(RouterTarget()(trace)) == float(RouterTarget(scale=1.9)(trace))
    outputs = expert_outputs(layer.student, trace.x)
    other = label_experts(outputs, trace.target, 2, "subset", 1.0)
    assert not torch.equal(other, label_experts(outputs, trace.target, 2, "subset", 1.9))


def test_an_evaluated_layer_asks_no_teacher_and_is_its_student():
    layer, x = taught(), drawn(TOKENS, D, seed=4)
    layer.eval()
    y, (trace,) = layer(x)
    assert trace.target is None and trace.overheard is None
    assert torch.equal(y, layer.student(x)[0])
    taught_once = layer.train().untraced_flops(7)
    assert layer.eval().untraced_flops(7).useful == 0 and taught_once.useful == 7 * 3 * 2 * D * W
    assert taught_once.training().useful == taught_once.useful  # nothing goes back through the teacher


def test_without_teacher_or_records_it_says_what_is_missing():
    layer, x = taught(record=False), drawn(TOKENS, D, seed=4)
    with pytest.raises(ValueError, match=r"router_target needs the outputs of all experts: student: \{..., record"):
        RouterTarget()(layer(x)[1][0])
    with pytest.raises(ValueError, match="router_target needs a layer with a teacher: ffn: {kind: taught"):
        RouterTarget()(layer.student(x)[1][0])
    with pytest.raises(ValueError, match="labels='best', allowed: subset, expert_error, projection"):
        RouterTarget("best")
    with pytest.raises(ValueError, match=r"184,756 sets of 10 among 20 experts, allowed: 20,000; labels: projection"):
        label_experts(drawn(1, 20, 2), drawn(1, 2), 10)


def test_padding_is_not_taught():
    layer, x = taught(), drawn(2, 4, D, seed=5)
    keep = torch.tensor([[True, True, False, True], [True, False, False, False]])
    y, (trace,) = layer(x, keep)
    assert len(trace.target) == 4 and not y[~keep].any()


@pytest.mark.parametrize("start", ["random", "zero", "probe"])
def test_teaching_raises_agreement_above_chance_and_changes_the_router_alone(start):
    """Experts that answer half of the tokens each: x_0 says which."""
    of = seen(tokens=600)
    made = split(of, n_experts=4, top_k=1)
    before = {name: value.clone() for name, value in made.layer.state_dict().items()}
    found = teach_router(made, of, RouterSettings(start, steps=150, lr=0.05))
    assert found["agreement"] > 0.45 > 1 / 4
    changed = {name for name, value in made.layer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"router.score.weight", "router.score.bias"}
    assert all(parameter.grad is None for parameter in made.layer.parameters())
    again = split(of, n_experts=4, top_k=1)
    assert teach_router(again, of, RouterSettings(start, steps=150, lr=0.05)) == found


def test_a_probe_knows_more_than_chance():
    of = seen(tokens=600)
    made = split(of, n_experts=4, top_k=1)
    found = teach_router(made, of, RouterSettings("probe"))
    assert found["agreement"] == found["agreement_start"] > 0.4
    assert labels_of(made, of, "subset").sum() == 600


def test_impossible_settings_of_routers():
    with pytest.raises(ValueError, match="start='ones', allowed: random, zero, probe"):
        RouterSettings("ones")
    with pytest.raises(ValueError, match="steps=-1, batch_tokens=512, lr=0.01"):
        RouterSettings(steps=-1)


def test_a_layer_of_one_expert_is_a_mixture_too():
    made = make_mixture(network(), [W], {"kind": "scaled_top_k", "top_k": 1}, torch.arange(W), "all")
    assert isinstance(made.layer, MoELayer) and made.layer.router.n_experts == 1


@pytest.mark.parametrize("labels", ["subset", "expert_error", "projection"])
def test_no_tokens_teach_nothing(labels):
    layer = taught()
    _, (trace,) = layer(drawn(TOKENS, D, seed=3), torch.zeros(TOKENS, dtype=torch.bool))
    loss = RouterTarget(labels)(trace)
    loss.backward()
    assert float(loss) == 0


def test_recorded_outputs_and_the_target_are_kept():
    """What all experts leave is many times what those chosen do."""
    plain, recording = taught(record=False), taught()
    assert recording.kept_per_token(D).numbers == recording.student.kept_per_token(D).numbers + D
    assert recording.kept_per_token(D).numbers > 1.5 * plain.kept_per_token(D).numbers
