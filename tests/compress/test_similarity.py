"""Similarity of experts: CKA and its estimators, cosines, and the order of hidden units."""

import pytest
import torch

from moestro.compress.similarity import (
    cka,
    mean_similarity,
    output_cka,
    output_cosine,
    output_distance,
    weight_cka,
    weight_cosine,
)
from moestro.compress.units import matched, matrices_of, merged, units_of
from tests.reference.expert_similarity import linear_cka, swiglu, unbiased_cka
from tests.tolerances import FLOAT64


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n, seed=0):
    return torch.linalg.qr(features(n, n, seed=seed)).Q


def expert(seed, width=6, d=5):
    return features(width, d, seed=seed), features(width, d, seed=seed + 100), features(d, width, seed=seed + 200)


@pytest.mark.parametrize(("debiased", "reference"), [(False, linear_cka), (True, unbiased_cka)])
def test_cka_is_that_of_the_equations(debiased, reference):
    outputs = features(3, 9, 4)
    outputs[1] = outputs[0] + 0.5 * outputs[1]
    found = output_cka(outputs, debiased)
    for i in range(3):
        for j in range(i):
            torch.testing.assert_close(float(found[i, j]), reference(outputs[i], outputs[j]), **FLOAT64)
    torch.testing.assert_close(found, found.T, **FLOAT64)


def test_cka_by_hand():
    x = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    y = torch.tensor([[1.0, 1], [0, 1], [0, 0]])
    grams = torch.stack([x @ x.T, y @ y.T])
    assert float(cka(grams, debiased=False)[0, 1]) == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
def test_rotation_scale_and_shift_leave_cka_at_1(debiased):
    x = features(30, 6)
    other = 3.0 * x @ rotation(6, 1) + features(6, seed=2)
    found = output_cka(torch.stack([x, other]), debiased)
    torch.testing.assert_close(found, torch.ones(2, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    # but a rotated expert is not one to merge with, and the cosine sees it
    assert abs(float(output_cosine(torch.stack([x, x @ rotation(6, 1)]))[0, 1])) < 0.5


def test_few_tokens_bias_cka_upwards_and_not_the_debiased_one():
    biased, debiased = [], []
    for seed in range(20):
        outputs = features(2, 40, 32, seed=seed)
        biased.append(float(output_cka(outputs, False)[0, 1]))
        debiased.append(float(output_cka(outputs, True)[0, 1]))
    assert min(biased) > 0.35
    assert abs(sum(debiased) / len(debiased)) < 0.05
    assert all(0 <= value <= 1 for value in biased)


def test_an_expert_that_never_varies_is_like_no_other():
    outputs = torch.stack([features(10, 4), torch.zeros(10, 4, dtype=torch.float64)])
    assert output_cka(outputs).tolist() == [[1, 0], [0, 1]]
    assert output_cosine(outputs).tolist() == [[1, 0], [0, 1]]


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        output_cka(features(2, 3, 4))


def test_units_and_matrices_are_the_same_expert():
    gate, up, down = expert(0)
    for before, after in zip((gate, up, down), matrices_of(units_of(gate, up, down), 5), strict=True):
        assert torch.equal(before, after)
    plain = matrices_of(units_of(None, up, down), 5)
    assert plain[0] is None and torch.equal(plain[1], up) and torch.equal(plain[2], down)


def test_a_copy_with_its_units_in_another_order_is_found_and_merged():
    one, x = units_of(*expert(0)), features(5, seed=9)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    other = one[order]
    assert matched(one, other).tolist() == order.argsort().tolist()
    assert float(weight_cosine([one, other], aligned=False)[0, 1]) < 0.5
    torch.testing.assert_close(float(weight_cosine([one, other])[0, 1]), 1.0, **FLOAT64)
    torch.testing.assert_close(float(weight_cka([one, other], 5)[0, 1]), 1.0, **FLOAT64)
    as_before = swiglu(*matrices_of(one, 5), x)
    aligned = swiglu(*matrices_of(merged([one, other], [0.5, 0.5]), 5), x)
    torch.testing.assert_close(aligned, as_before, **FLOAT64)
    unaligned = swiglu(*matrices_of(merged([one, other], [0.5, 0.5], align=False), 5), x)
    assert float((unaligned - as_before).norm() / as_before.norm()) > 0.1


def test_merging_is_the_weighted_sum_in_the_order_of_the_reference():
    one, other = units_of(*expert(0)), units_of(*expert(1))
    order = matched(other, one)
    torch.testing.assert_close(merged([one, other], [0.25, 0.75], reference=1), 0.25 * one[order] + 0.75 * other)
    assert merged([one], [1.0]) is one
    with pytest.raises(ValueError, match="2 members, 1 weights"):
        merged([one, other], [1.0])
    with pytest.raises(ValueError, match="equal shapes"):
        matched(one, one[:3])


def test_weight_cosine_without_alignment_is_that_of_flat_weights():
    one, other = units_of(*expert(0)), units_of(*expert(1))
    flat = float(one.flatten() @ other.flatten() / one.norm() / other.norm())
    torch.testing.assert_close(float(weight_cosine([one, other], aligned=False)[0, 1]), flat, **FLOAT64)
    assert float(weight_cosine([one, other])[0, 1]) > flat
    with pytest.raises(ValueError, match="all alike"):
        weight_cosine([one, other[:2]])


def test_distance_of_mean_outputs_and_mean_similarity():
    means = torch.tensor([[0.0, 0], [3, 4], [0, 1]])
    expected = torch.tensor([[0.0, -5, -1], [-5, 0, -(18**0.5)], [-1, -(18**0.5), 0]], dtype=torch.float64)
    torch.testing.assert_close(output_distance(means), expected, rtol=1e-6, atol=1e-6)
    assert mean_similarity(torch.tensor([[1.0, 0.2], [0.4, 1.0]])) == pytest.approx(0.3)
    assert mean_similarity(torch.ones(1, 1)) == 1


@pytest.mark.parametrize("similarity", ["output_cka", "output_cosine", "weight_cosine", "weight_cka"])
def test_planted_near_copies_are_the_most_alike(similarity):
    """8 experts in 4 pairs, the second of each with its units in another order and 2 % of noise."""
    x, experts = features(64, 5, seed=5), []
    for pair in range(4):
        one = units_of(*expert(pair, width=8))
        order = torch.randperm(8, generator=torch.Generator().manual_seed(pair))
        experts += [one, (one + 0.02 * features(8, 15, seed=50 + pair))[order]]
    outputs = torch.stack([torch.stack([swiglu(*matrices_of(e, 5), token) for token in x]) for e in experts])
    alike = {
        "output_cka": lambda: output_cka(outputs),
        "output_cosine": lambda: output_cosine(outputs),
        "weight_cosine": lambda: weight_cosine(experts),
        "weight_cka": lambda: weight_cka(experts, 5, debiased=False),
    }[similarity]()
    nearest = alike.fill_diagonal_(-1).argmax(1).tolist()
    assert nearest == [1, 0, 3, 2, 5, 4, 7, 6]
