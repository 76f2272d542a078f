"""Experts of one cluster should get the same tokens' probability."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.objectives.balance import over_tokens, require_logits, token_mean
from moestro.routing import Trace, present


@dataclass(frozen=True)
class ClusterVariance:
    """E^2 times the mean over clusters of the variance of P_e within each (Xie 2022, MoEC, arXiv:2207.09094; from its
    released code). P_e is the mean probability of expert e, E the number of experts that take part. Variances are
    unbiased (n - 1), 0 for a cluster of one expert. 0 if and only if probability is even inside every cluster.

    form `all`: all experts as one cluster (the code's type 0); `within`: as above (type 1, which it uses); `gap`: times
    exp(-(C1 - C2)), the two largest cluster means of P (type 2, which takes blocks of sorted experts instead of the
    clusters); `token_gap`, ours: times exp(-gap), gap the mean over tokens of how much more probability a token's best
    cluster has than its second. With one cluster there is no gap.

    The code takes sums over tokens for P and no E^2, so that its weight grows with the square of the batch: its
    lambda is about lambda * tokens / E here. Experts that are not available count nowhere.
    """

    form: Literal["all", "within", "gap", "token_gap"] = "within"

    def __post_init__(self) -> None:
        if self.form not in ("all", "within", "gap", "token_gap"):
            raise ValueError(f"form={self.form!r}, allowed: all, within, gap, token_gap")

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        """Raises: ValueError where the layer has no clusters."""
        logits = require_logits(trace.routing, "cluster_variance")
        cluster = trace.layer.cluster
        if cluster is None:
            raise ValueError("cluster_variance found a layer without clusters; allowed: ffn: {kind: moe, clusters: 8}")
        there = present(logits)
        probability = logits.softmax(-1)
        (share,) = over_tokens(trace, probability.sum(0))
        variance = _variance(share, torch.zeros_like(cluster) if self.form == "all" else cluster, there)
        value = there.sum() ** 2 * variance
        if self.form == "gap":
            return value * (-_gap(_means(share, cluster, there)[None])).exp().squeeze(0)
        if self.form == "token_gap":
            mass = torch.zeros_like(probability).index_add(1, cluster, probability)
            counted = mass.masked_fill(_count(cluster, there) == 0, -torch.inf)
            return value * (-token_mean(trace, _gap(counted).sum())).exp()
        return value


def _count(cluster: Int[Tensor, "e"], there: Tensor) -> Float[Tensor, "e"]:
    """Available experts of every cluster; as many places as experts, for nobody asks how many clusters there are."""
    return torch.zeros(len(cluster), device=cluster.device).index_add(0, cluster, there.float())


def _means(share: Float[Tensor, "e"], cluster: Int[Tensor, "e"], there: Tensor) -> Float[Tensor, "e"]:
    """Mean share of every cluster's available experts, -inf where it has none."""
    count = _count(cluster, there)
    total = torch.zeros_like(share).index_add(0, cluster, share * there)
    return (total / count.clamp(min=1)).masked_fill(count == 0, -torch.inf)


def _variance(share: Float[Tensor, "e"], cluster: Int[Tensor, "e"], there: Tensor) -> Float[Tensor, ""]:
    """Mean over the clusters that have experts of the unbiased variance inside."""
    count = _count(cluster, there)
    distance = torch.where(there, share - _means(share, cluster, there)[cluster], 0.0)
    inside = torch.zeros_like(share).index_add(0, cluster, distance.square()) / (count - 1).clamp(min=1)
    return inside.sum() / (count > 0).sum().clamp(min=1)


def _gap(values: Float[Tensor, "t e"]) -> Float[Tensor, "t"]:
    """Largest less second largest; 0 where there is only one."""
    two = values.topk(min(2, values.shape[1])).values
    gap = two[:, 0] - two[:, -1]
    return torch.where(two[:, -1] > -torch.inf, gap, 0.0)
