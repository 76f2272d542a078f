"""Recovery after compression."""

import pytest
import torch

from moestro.compress.applied import applied
from moestro.compress.healing import Addition, Healing, LowRank, heal_by_lora, heal_routers, matrices
from moestro.compress.plan import LayerPlan
from moestro.evaluate import evaluate
from moestro.experts import StackedBank
from tests.compress.models import E, decoder, text


def pruned(model):
    return applied(model, [LayerPlan(number, E, (0, 2, 5)) for number in (0, 1)])


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_lora_lowers_the_loss_and_leaves_weights_of_the_same_names():
    model, batches = pruned(decoder("mm")), text(2)
    before, names = evaluate(model, batches)["loss"], state(model)
    losses = heal_by_lora(model, lambda step: batches[step % 2], Healing(steps=20, lr=0.01, rank=2))
    after = state(model)
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert evaluate(model, batches)["loss"] < before
    assert set(after) == set(names) and all(p.requires_grad and p.grad is None for p in model.parameters())
    changed = {name for name in names if not torch.equal(names[name], after[name])}
    kept = {name for name in names if "router" in name or "norm" in name or name in ("embedding.weight", "head.weight")}
    assert changed == set(names) - kept


def test_what_lora_adds_is_of_its_rank():
    model, batches = pruned(decoder("mm")), text(1)
    before = state(model)
    heal_by_lora(model, lambda step: batches[0], Healing(steps=3, rank=2, lr=0.01))
    added = {name: value - before[name] for name, value in state(model).items() if value.ndim == 2}
    ranks = {name: int(torch.linalg.matrix_rank(change, rtol=1e-6)) for name, change in added.items() if change.any()}
    assert len(ranks) > 4 and set(ranks.values()) == {2}, ranks


def test_lora_starts_as_the_weights_and_reaches_stacked_experts():
    weight = torch.randn(3, 6, 4)
    addition = LowRank(weight, 2, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(addition(weight), weight) and addition.a.shape == (3, 2, 4) and addition.b.shape == (3, 6, 2)
    model = decoder("m")
    model.moe_layers()["blocks.0.ffn"].branches[0] = StackedBank(8, E, 5).double()
    before = state(model)
    heal_by_lora(model, lambda step: text(1)[0], Healing(steps=2, rank=2, lr=0.01))
    after = state(model)
    stacked = [name for name in before if name.endswith(("gate_up", "down"))]
    assert len(stacked) == 2 and not any(torch.equal(before[name], after[name]) for name in stacked)


@pytest.mark.parametrize("kind", [Addition, lambda w: LowRank(w, 2, 1.0, torch.Generator().manual_seed(0))])
def test_what_is_learned_for_narrow_weights_is_kept_wide(kind):
    weight = torch.randn(6, 4, dtype=torch.bfloat16)
    addition = kind(weight)
    assert {p.dtype for p in addition.parameters()} == {torch.float32}
    assert addition(weight).dtype == torch.bfloat16 and torch.equal(addition(weight), weight)


def test_routers_learn_from_the_model_as_it_was_and_nothing_else_does():
    teacher = decoder("mm")
    model, batches = pruned(teacher), text(2)
    before, taught = state(model), state(teacher)
    losses = heal_routers(model, teacher, lambda step: batches[step % 2], Healing(steps=30, lr=0.02))
    assert losses[-1] < losses[0] and min(losses) >= 0
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {f"blocks.{number}.ffn.router.score.weight" for number in range(2)}
    assert all(torch.equal(value, taught[name]) for name, value in state(teacher).items())


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn():
    model = decoder("m")
    losses = heal_routers(model, decoder("m"), lambda step: text(1)[0], Healing(steps=1))
    assert losses == [pytest.approx(0, abs=1e-6)]


def test_healing_is_the_same_for_the_same_seed():
    results = []
    for seed in (0, 0, 1):
        model = pruned(decoder("mm"))
        results.append(heal_by_lora(model, lambda step: text(1)[0], Healing(steps=3, rank=2), seed))
    assert results[0] == results[1] != results[2]


def test_impossible_healing_is_refused():
    for bad in ({"steps": 0}, {"steps": 1.5}, {"rank": True}, {"lr": "fast"}, {"alpha": float("nan")}, {"clip": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*allowed: "):
            Healing(**bad)
    assert len(list(matrices(decoder("mm")))) == 2 * (4 + 2)
