"""Batch normalisation of PEER's queries: what depends on whom, and when (check 8 of the list in test_peer.py)."""

import pytest
import torch
from torch import Tensor

from moestro.layers import MoELayer
from moestro.routers import ProductKeyRouter
from moestro.routers.query_norm import Statistics
from moestro.routing import SparseRouting, Trace
from moestro.train.rules import QueryNormStatistics
from tests.reference import peer
from tests.systems.peer_layers import D, Norm, batch_norm, make_layer, random, router_of, set_running_statistics
from tests.tolerances import FLOAT64

close = torch.testing.assert_close


def traced(layer: MoELayer, x: Tensor) -> Trace:
    _, (trace,) = layer(x)
    return trace


def statistics(layer: MoELayer, x: Tensor) -> Statistics:
    routing = traced(layer, x).routing
    assert isinstance(routing, SparseRouting) and routing.query_stats is not None
    return routing.query_stats


def test_in_training_a_query_depends_on_the_other_tokens() -> None:
    """As in the paper: training statistics mix future tokens in, so a training loss is not quite a prediction's."""
    layer, x = make_layer(), random(12, D)
    other = torch.cat([x[:6], random(6, D)])
    assert (layer(x)[0][:6] - layer(other)[0][:6]).abs().max() > 1e-3


def test_in_evaluation_a_token_depends_on_itself_alone() -> None:
    layer, x = make_layer(), random(12, D)
    set_running_statistics(layer)
    layer.eval()
    other = torch.cat([x[:6], random(6, D)])
    assert torch.equal(layer(x)[0][:6], layer(other)[0][:6])
    one_by_one = torch.cat([layer(token[None])[0] for token in x])
    close(one_by_one, layer(x)[0], **FLOAT64)


def test_training_batch_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens in a training batch, got 1"):
        make_layer()(random(1, D))


def test_evaluation_before_any_statistics_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no running statistics yet.*QueryNormStatistics"):
        make_layer().eval()(random(4, D))


def test_forward_reports_the_moments_of_its_queries_and_changes_nothing() -> None:
    layer, x = make_layer(), random(9, D)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    stats = statistics(layer, x)
    mean, variance = peer.batch_moments(peer.queries(x, router_of(layer).query.detach()))
    close(stats[0], mean, **FLOAT64)
    close(stats[1], variance, **FLOAT64)
    assert stats[2] == 9 and not stats[0].requires_grad and not stats[1].requires_grad
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_running_statistics_start_at_the_first_batch_and_then_follow() -> None:
    """An update moves them by the momentum; the first replaces the zeros and ones they start as."""
    layer = make_layer()
    norm, batches = batch_norm(layer), [random(8, D) for _ in range(4)]
    moments = [peer.batch_moments(peer.queries(x, router_of(layer).query.detach())) for x in batches]
    mean, variance = moments[0]
    for step, x in enumerate(batches):
        stats = statistics(layer, x)
        norm.update(stats[0], stats[1], 0.2)
        if step:
            mean = peer.running(mean, moments[step][0], 0.2)
            variance = peer.running(variance, moments[step][1], 0.2)
        close(norm.mean, mean, **FLOAT64)
        close(norm.variance, variance, **FLOAT64)


def test_the_rule_keeps_statistics_of_the_whole_step() -> None:
    """Accumulation: two unequal micro-batches of one step count as the batch they make together, once."""
    layer, x = make_layer(), random(11, D)
    rule = QueryNormStatistics(momentum=0.3)
    for micro_batch in (x[:4], x[4:]):
        rule.observe(traced(layer, micro_batch))
    rule.apply(1)
    mean, variance = peer.batch_moments(peer.queries(x, router_of(layer).query.detach()))
    close(batch_norm(layer).mean, mean, **FLOAT64)
    close(batch_norm(layer).variance, variance, **FLOAT64)
    assert int(batch_norm(layer).updates) == 1


def test_the_rule_ignores_layers_in_evaluation_and_other_routers() -> None:
    layer = make_layer()
    set_running_statistics(layer)
    before = batch_norm(layer).mean.clone()
    rule = QueryNormStatistics()
    rule.observe(traced(layer.eval(), random(4, D)))
    rule.observe(traced(make_layer(norm="layer"), random(4, D)))
    rule.apply(1)
    assert torch.equal(batch_norm(layer).mean, before)


def test_normalised_queries_have_no_mean_and_unit_variance() -> None:
    """The point of it: before the affine, every feature of a training batch is standardised."""
    layer = make_layer()
    norm = batch_norm(layer)
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.bias.fill_(0)
    query, _ = norm(3 + 5 * random(1000, norm.features))
    close(query.mean(0), torch.zeros_like(norm.mean), **FLOAT64)
    close(query.var(0, correction=0), torch.ones_like(norm.mean), rtol=1e-5, atol=0)


def test_query_key_norm_bounds_scores_and_starts_at_the_variance_without() -> None:
    """Not of the paper: Memory+ normalises queries and keys where training is unstable."""
    torch.manual_seed(0)
    with_norm, without = (ProductKeyRouter(32, 64**2, 4, 8, 64, query_norm=norm) for norm in ("qk_rms", "none"))
    x = torch.randn(200, 32)

    @torch.no_grad()
    def scores(router: ProductKeyRouter) -> Tensor:
        query, stats = router.query_norm(x @ router.query.T)
        assert stats is None
        halves = query.view(200, 4, 2, 32)
        return torch.einsum("thsc,snc->thsn", halves, router.query_norm.of_keys(router.keys)[:, 0])

    assert abs(float(scores(with_norm).var() / scores(without).var()) - 1) < 0.1
    with torch.no_grad():
        with_norm.keys.mul_(1000.0), with_norm.query.mul_(1000.0)
    # Cauchy and Schwarz: the gain, times 32^0.5 for each of the two vectors
    assert float(scores(with_norm).abs().max()) <= 32 * (3 * 32) ** -0.5


def test_query_key_norm_survives_keys_of_zeros() -> None:
    router = ProductKeyRouter(8, 16, 2, 3, 4, query_norm="qk_rms")
    with torch.no_grad():
        router.keys.zero_()
    routing = router(torch.randn(5, 8))
    routing.weight.square().sum().backward()
    assert routing.weight.isfinite().all() and router.keys.grad is not None and router.keys.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "qk_rms", "none"])
def test_a_router_kept_in_bfloat16_chooses_in_float32(norm: Norm) -> None:
    router = ProductKeyRouter(8, 16, 2, 3, 4, query_norm=norm)
    rounded = router.bfloat16()
    x = torch.randn(5, 8).bfloat16()
    weight = rounded(x).weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, rounded.float()(x.float()).weight)
