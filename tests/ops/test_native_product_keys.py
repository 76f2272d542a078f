"""Product-key retrieval on compiled kernels: exact for any sizes, ties in the order of the definition."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moestro import ops
from moestro.ops import backend, native
from moestro.ops.native import product_key
from tests.tolerances import FLOAT32

pytestmark = pytest.mark.skipif(native.library().handle is None, reason=f"native kernels {native.status()}")
# tokens, heads, n, k, half
SIZES = {
    "one token": (1, 1, 5, 3, 7),
    "k = n": (7, 2, 9, 9, 4),
    "k = 1": (50, 3, 70, 1, 5),
    "blocks and tails": (101, 2, 131, 16, 33),
    "many chosen": (5, 1, 200, 130, 8),
    "many keys": (4, 1, 400, 16, 12),
    "no tokens": (0, 2, 8, 2, 4),
}


def draw(case: str, shared: bool, whole: bool):
    """Query and keys in float32; small whole numbers, whose sums are exact and often equal, or any."""
    t, h, n, k, half = SIZES[case]
    generator = torch.Generator().manual_seed(t + n)
    shapes = (t, h, 2 * half), (2, 1 if shared else h, n, half)
    if whole:
        return *(torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes), k
    return *(torch.randn(shape, generator=generator) for shape in shapes), k


def topk(name: str, query, keys, k: int):
    """Scores, ids, and the gradients of query and keys."""
    leaves = [v.detach().clone().requires_grad_() for v in (query, keys)]
    with backend.force(name):
        scores, ids = ops.product_key_topk(*leaves, k)
        # by what was chosen, not by its rank: rounding may exchange neighbours
        factor = 0.5 + (ids % 101).to(scores.dtype) / 100
        return scores.detach(), ids, *torch.autograd.grad((scores * factor).sum(), leaves)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", SIZES)
def test_equal_scores_are_in_the_order_of_the_definition(case, variant, shared):
    query, keys, k = draw(case, shared, whole=True)
    have = topk("native", query, keys, k)
    want = topk("reference", query.double(), keys.double(), k)
    assert torch.equal(have[0].double(), want[0]) and torch.equal(have[1], want[1])
    if case == "blocks and tails":
        assert (have[0].diff(dim=-1) == 0).any()
    for mine, true in zip(have[2:], want[2:], strict=True):
        torch.testing.assert_close(mine.double(), true, **FLOAT32)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", SIZES)
def test_equals_the_definition_on_any_numbers(case, variant, shared):
    query, keys, k = draw(case, shared, whole=False)
    have = topk("native", query, keys, k)
    want = topk("reference", query.double(), keys.double(), k)
    torch.testing.assert_close(have[0].double(), want[0], **FLOAT32)
    assert torch.equal(have[1].sort(-1).values, want[1].sort(-1).values)
    for mine, true in zip(have[2:], want[2:], strict=True):
        torch.testing.assert_close(mine.double(), true, **FLOAT32)


@pytest.mark.parametrize(("tokens", "n"), [(37, 131), (17, 400), (2, 1024)])
def test_a_few_keys_far_above_the_others_hide_none(variant, tokens, n):
    """The k-th best is then searched for in a range that is almost empty, and nearly all keys are looked at again."""
    keys = torch.randn(2, 1, n, 8, generator=torch.Generator().manual_seed(n))
    keys[:, :, :5] *= 1e12
    query = torch.randn(tokens, 2, 16, generator=torch.Generator().manual_seed(1))
    scores, ids, *_ = topk("native", query, keys, 16)
    want, chosen, *_ = topk("reference", query.double(), keys.double(), 16)
    torch.testing.assert_close(scores.double(), want, **FLOAT32)
    assert torch.equal(ids, chosen)


def test_a_query_of_zeros_chooses_the_first_keys(variant):
    keys = torch.randn(2, 1, 100, 6)
    keys[:, :, ::2] *= -1.0
    scores, ids, *_ = topk("native", torch.zeros(3, 2, 12), keys, 10)
    assert not scores.any()
    assert torch.equal(ids, torch.arange(10).expand(3, 2, 10))


@pytest.mark.parametrize("n", [100, 400])
def test_a_key_that_is_nan_is_chosen_and_infinities_are_in_order(variant, n):
    keys = torch.randn(2, 1, n, 4)
    keys[0, 0, 37] = torch.nan
    keys[0, 0, 51, 0], keys[0, 0, 8, 0] = torch.inf, -torch.inf
    query = torch.ones(2, 1, 8)
    scores, ids, *_ = topk("native", query, keys, 3)
    assert scores[..., 0].isnan().all() and bool((ids[..., 0] // n == 37).all())
    keys[0, 0, 37] = 0.0
    scores, ids, *_ = topk("native", query, keys, 3)
    assert bool((ids // n == 51).all()) and bool(scores.isposinf().all())


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    query, keys, k = draw("blocks and tails", shared=False, whole=False)
    low = query.bfloat16(), keys.bfloat16()
    scores, ids, *gradients = topk("native", *low, k)
    want = topk("native", *(v.float() for v in low), k)
    assert scores.dtype == torch.bfloat16 and [g.dtype for g in gradients] == [torch.bfloat16] * 2
    assert torch.equal(scores, want[0].bfloat16()) and torch.equal(ids, want[1])


def test_the_same_to_the_bit_on_two_threads_and_again(two_threads):
    query, keys, k = draw("blocks and tails", shared=True, whole=False)
    runs = [topk("native", query, keys, k) for _ in range(2)]
    torch.set_num_threads(1)
    runs.append(topk("native", query, keys, k))
    for other in runs[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(runs[0], other, strict=True))


def test_a_token_s_result_does_not_depend_on_the_others():
    query, keys, k = draw("blocks and tails", shared=False, whole=False)
    scores, ids, *_ = topk("native", query, keys, k)
    alone, alone_ids, *_ = topk("native", query[77:78], keys, k)
    assert torch.equal(alone[0], scores[77]) and torch.equal(alone_ids[0], ids[77])


def test_scores_of_all_keys_are_never_in_memory():
    t, h, n, half = 200, 2, 100, 4
    query, keys = torch.randn(t, h, 2 * half, requires_grad=True), torch.randn(2, h, n, half, requires_grad=True)

    def largest(name: str) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace, backend.force(name):
            ops.product_key_topk(query, keys, 4)[0].sum().backward()
        return max(e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")

    # the other way shows that the measure sees them
    assert largest("native") < t * h * 2 * n * 4 <= largest("fused")


def test_sums_of_infinities_of_both_signs_come_first(variant):
    """They are not numbers; a bound on the k-th best sum must not be one."""
    keys = torch.randint(-2, 3, (2, 2, 70, 4), generator=torch.Generator().manual_seed(0)).float()
    keys[0, :, 5, 0], keys[1, :, 3:60, 0] = torch.inf, -torch.inf
    query = torch.ones(3, 2, 8)
    scores, *_ = topk("native", query, keys, 50)
    want, *_ = topk("fused", query, keys, 50)
    assert scores.isnan().any() and scores.isposinf().any()
    torch.testing.assert_close(scores, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("half", "scale", "n"), [(128, 1.0, 64), (128, 1e-12, 64), (33, 1e12, 64), (128, 1.0, 400)])
def test_scores_are_as_exact_as_torch_s_products(variant, half, scale, n):
    generator = torch.Generator().manual_seed(half)
    query, keys = torch.randn(300, 1, 2 * half, generator=generator) * scale, torch.randn(2, 1, n, half)
    scores, ids, *_ = topk("native", query, keys, 8)
    left, right = ids // n, ids % n

    def chosen(dtype: torch.dtype):
        sides = torch.einsum("thsc,shnc->thsn", query.view(300, 1, 2, half).to(dtype), keys.to(dtype))
        return (sides[:, :, 0].gather(-1, left) + sides[:, :, 1].gather(-1, right)).double() / scale

    true = chosen(torch.float64)
    mine, theirs = ((found - true).square().mean().sqrt() for found in (scores.double() / scale, chosen(torch.float32)))
    assert 0 < mine <= 1.1 * theirs


def test_great_numbers_are_multiplied_as_others_are(variant):
    """Their pieces would overflow; tokens beside them have the scores that they have alone."""
    generator = torch.Generator().manual_seed(3)
    query, keys = torch.randn(40, 2, 14, generator=generator), torch.randn(2, 2, 50, 7, generator=generator) / 10
    great = 3.4e38
    plain = topk("native", query, keys, 5)
    query[17, 1, 3], query[23, 0, 9] = great, torch.inf
    scores, ids, *_ = topk("native", query, keys, 5)
    want = topk("reference", query[17:18], keys, 5)
    assert torch.equal(ids[17, 1], want[1][0, 1]) and bool(scores[23, 0].isposinf().all())
    torch.testing.assert_close(scores[17, 1], want[0][0, 1], **FLOAT32)
    assert 1e36 < scores[17, 1, 0] < torch.inf
    others = torch.ones(40, 2, dtype=torch.bool)
    others[17, 1] = others[23, 0] = False
    assert torch.equal(scores[others], plain[0][others]) and torch.equal(ids[others], plain[1][others])
    query, keys[0, 1, 4, 2] = query[:17] / 10, -great
    scores, ids, *_ = topk("native", query, keys, 5)
    want = topk("reference", query, keys, 5)
    assert torch.equal(ids, want[1])
    torch.testing.assert_close(scores, want[0], **FLOAT32)


@pytest.mark.parametrize("tokens", [127, 129, 300])
def test_the_same_to_the_bit_however_tokens_are_divided(tokens, monkeypatch):
    generator = torch.Generator().manual_seed(tokens)
    query, keys = torch.randn(tokens, 2, 24, generator=generator), torch.randn(2, 2, 40, 12, generator=generator)
    whole = topk("native", query, keys, 4)
    for fewest, most in ((1, 1), (7, 50), (1000, 1000)):
        monkeypatch.setattr(product_key, "FEWEST", fewest)
        monkeypatch.setattr(product_key, "MOST", most)
        assert all(torch.equal(a, b) for a, b in zip(whole, topk("native", query, keys, 4), strict=True))


@pytest.mark.parametrize("n", [383, 384, 1000])
def test_what_is_rounded_to_find_the_best_keys_loses_none(n, variant):
    """Keys that differ by less than bfloat16 can tell, and of lengths far apart; queries of every size."""
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(2, 1, 1, 40, generator=generator)
    keys = base + 1e-3 * torch.randn(2, 1, n, 40, generator=generator)
    keys[:, :, ::3] *= 1 + 1e-4 * torch.rand(1, 1, len(range(0, n, 3)), 1, generator=generator)
    keys[:, :, 1::9] *= -100.0
    query = torch.randn(60, 1, 80, generator=generator) * torch.logspace(-24, 18, 60)[:, None, None]
    query[7] = 0.0
    scores, ids, *_ = topk("native", query, keys, 16)
    sides = torch.einsum("tsc,snc->tsn", query.view(60, 2, 40).double(), keys[:, 0].double())
    best = sides.topk(16).values
    true = (best[:, 0, :, None] + best[:, 1, None]).flatten(1).topk(16).values
    chosen = sides[:, 0].gather(-1, ids[:, 0] // n) + sides[:, 1].gather(-1, ids[:, 0] % n)
    size = sides.abs().amax((1, 2))[:, None].clamp(min=1e-30)
    for found in (scores[:, 0].double(), chosen):
        torch.testing.assert_close(found / size, true / size, rtol=0, atol=1e-5)
