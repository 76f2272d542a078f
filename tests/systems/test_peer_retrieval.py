"""Product-key retrieval is exact (checks 1, 2 and 13 of the list in test_peer.py)."""

import pytest
import torch
from torch import Tensor

from moestro.ops import backend, product_key_topk
from moestro.routers import ProductKeyRouter
from tests.reference import peer
from tests.systems.peer_layers import make_layer, random
from tests.tolerances import FLOAT64

close = torch.testing.assert_close


def brute_force(query: Tensor, keys: Tensor, k: int) -> tuple[list[list[list[int]]], Tensor]:
    """For query [t, h, c] and keys [2, 1 or h, n, c/2]: indices and scores over all n*n keys."""
    index, scores = [], []
    for heads in query:
        first, second = keys.expand(2, len(heads), -1, -1)
        found = [peer.retrieve(q, first[a], second[a], k) for a, q in enumerate(heads)]
        index.append([i for _, i in found])
        scores.append(torch.stack([s for s, _ in found]))
    return index, torch.stack(scores)


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "d_key", "heads"),
    [(4, 1, 2, 1), (4, 4, 6, 2), (8, 3, 4, 3), (9, 9, 2, 1), (16, 16, 8, 2), (20, 7, 16, 1)],
)
def test_product_keys_equal_brute_force(n: int, k: int, d_key: int, heads: int, shared: bool, how: str) -> None:
    """Check 1: sets, order and scores, k = n included."""
    query, keys = random(5, heads, d_key), random(2, 1 if shared else heads, n, d_key // 2)
    with backend.force(how):
        scores, ids = product_key_topk(query, keys, k)
    index, expected = brute_force(query, keys, k)
    assert ids.tolist() == index
    close(scores, expected, **FLOAT64)


def test_the_case_in_which_fewer_candidates_are_not_exact() -> None:
    """N = 4096, k = 16: half of the candidates a side is enough for about half of the queries only."""
    query, keys = random(30, 1, 16), random(2, 1, 64, 8)
    _, ids = product_key_topk(query, keys, 16)
    index, _ = brute_force(query, keys, 16)
    assert ids.tolist() == index
    # what the module would find with 8 candidates a side, so that this test can fail
    left, right = (query[:, 0, 8 * s : 8 * s + 8] @ keys[s, 0].T for s in (0, 1))
    (v1, i1), (v2, i2) = left.topk(8), right.topk(8)
    pick = (v1[:, :, None] + v2[:, None, :]).flatten(1).topk(16).indices
    short = i1.gather(1, pick // 8) * 64 + i2.gather(1, pick % 8)
    exact = sum(set(a) == set(b[0]) for a, b in zip(short.tolist(), index, strict=True))
    assert exact < 28


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_staircase_of_candidates_is_exact(k: int) -> None:
    """Check 1: only pairs of ranks with p * r <= k can win; the reference says so, and ours equals it."""
    query, keys = random(20, 1, 6), random(2, 1, 8, 3)
    _, ids = product_key_topk(query, keys, k)
    for q, found in zip(query[:, 0], ids[:, 0].tolist(), strict=True):
        assert set(found) == peer.staircase(q, keys[0, 0], keys[1, 0], k)


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize(("i", "j"), [(0, 0), (0, 3), (4, 1), (2, 4)])
def test_the_pair_i_j_is_expert_i_n_plus_j(i: int, j: int, how: str) -> None:
    """Check 2: only key i of the first side and key j of the second match the query."""
    keys = torch.zeros(2, 1, 5, 2, dtype=torch.float64)
    keys[0, 0, i, 0], keys[1, 0, j, 1] = 1.0, 1.0
    query = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]], dtype=torch.float64)
    with backend.force(how):
        scores, ids = product_key_topk(query, keys, 1)
    assert ids.item() == i * 5 + j and scores.item() == 2.0


def test_more_experts_are_used_than_candidates_exist() -> None:
    """Check 2: a position among the k*k candidates mistaken for an expert would never leave 0 ... k*k - 1."""
    _, (trace,) = make_layer(side=8, heads=2, k=2)(random(300, 5))
    assert len(trace.routing.expert.unique()) > 4 * 4
    assert int(trace.routing.expert.max()) >= 4 * 4


@pytest.mark.parametrize("how", ["fused", "reference"])
def test_more_winners_than_sub_keys_are_refused(how: str) -> None:
    with backend.force(how), pytest.raises(ValueError, match="top_k=5 > 4 sub-keys a side"):
        product_key_topk(random(1, 1, 4), random(2, 1, 4, 2), 5)


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_make_no_nan_and_no_duplicates(dtype: torch.dtype, how: str) -> None:
    """Check 13: all keys equal, so that every one of the N scores ties."""
    router = ProductKeyRouter(6, 25, heads=2, top_k=5, d_key=4, query_norm="none").to(dtype)
    torch.nn.init.ones_(router.keys)
    with backend.force(how):
        routing = router(torch.ones(7, 6, dtype=dtype))
    ids, weight = routing.matrix()
    close(weight, torch.full_like(weight, 1 / 5))
    for token in ids.view(7, 2, 5).tolist():
        assert all(len(set(head)) == 5 and 0 <= min(head) and max(head) < 25 for head in token)
