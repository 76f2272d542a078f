"""Product-key retrieval is exact: equal to brute force over all pairs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moestro import ops
from moestro.ops import backend, product_key
from tests.tolerances import FLOAT64


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("heads", "side", "k", "half"), [(1, 4, 4, 2), (2, 8, 3, 4), (3, 16, 16, 1), (4, 31, 5, 8)])
def test_equals_brute_force(shared, heads, side, k, half):
    generator = torch.Generator().manual_seed(side * k)
    query = torch.randn(50, heads, 2 * half, generator=generator, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 1 if shared else heads, side, half, generator=generator, dtype=torch.float64)
    keys.requires_grad_()
    results = {}
    for name in backend.EVERYWHERE:
        with backend.force(name):
            scores, ids = ops.product_key_topk(query, keys, k)
        results[name] = scores, ids, *torch.autograd.grad(scores.square().sum(), (query, keys))
    for have, want in zip(results["fused"], results["reference"], strict=True):
        torch.testing.assert_close(have, want, **(FLOAT64 if have.is_floating_point() else {}))


def test_only_the_matching_pair_of_keys_is_hit():
    side = 7
    keys = torch.zeros(2, 1, side, 2, dtype=torch.float64)
    keys[0, 0, 5, 0], keys[1, 0, 2, 1] = 1.0, 1.0
    query = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]], dtype=torch.float64)
    scores, ids = ops.product_key_topk(query, keys, 1)
    assert ids.item() == 5 * side + 2
    assert scores.item() == 2.0


def test_more_results_than_keys_of_a_side_are_refused():
    with pytest.raises(ValueError, match="top_k=5 > 4 sub-keys a side"):
        ops.product_key_topk(torch.zeros(1, 1, 2), torch.zeros(2, 1, 4, 1), 5)


@pytest.mark.parametrize(
    ("query", "keys", "k", "message"),
    [
        ((3, 2, 8), (2, 1, 4, 4), 0, "top_k=0, allowed: at least 1"),
        ((3, 2, 6), (2, 1, 4, 4), 2, r"keys \[2, 1, 4, 4\] for queries \[3, 2, 6\], allowed: \[2, 1 or heads"),
        ((3, 2, 8), (2, 3, 4, 4), 2, r"keys \[2, 3, 4, 4\]"),
        ((3, 2, 8), (1, 1, 4, 4), 2, r"keys \[1, 1, 4, 4\]"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_that_do_not_fit_are_refused(query, keys, k, message, dtype, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        ops.product_key_topk(torch.zeros(query, dtype=dtype), torch.zeros(keys, dtype=dtype), k)


@pytest.mark.parametrize("shared", [True, False])
def test_plain_torch_has_few_scores_in_memory(shared, monkeypatch):
    """Outputs and gradients of all tokens at once, of which no more than 3 are scored at a time; also of none."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(10, 2, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 1 if shared else 2, 16, 2, generator=draw, dtype=torch.float64, requires_grad=True)

    def searched():
        with backend.force("fused"), Largest() as seen:
            scores, ids = ops.product_key_topk(query, keys, 2)
            gradients = torch.autograd.grad(scores.square().sum(), (query, keys))
        return (scores, ids, *gradients), seen.numbers

    whole, numbers = searched()
    assert numbers == 10 * 2 * 2 * 16
    monkeypatch.setattr(product_key, "SCORES", 3 * 2 * 2 * 16 + 1)
    parts, numbers = searched()
    assert numbers == 3 * 2 * 2 * 16
    for have, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(have, want, **(FLOAT64 if have.is_floating_point() else {}))
    with backend.force("fused"):
        assert all(part.shape == (0, 2, 2) for part in ops.product_key_topk(query[:0], keys, 2))


class Largest(TorchDispatchMode):
    """The most numbers that a result of an operation has."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        out = operation(*arguments, **(keywords or {}))
        self.numbers = max([self.numbers, *(v.numel() for v in tree_leaves(out) if isinstance(v, torch.Tensor))])
        return out
