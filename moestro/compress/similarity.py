"""How alike experts are: of what they answer and of what they are made of (arXiv:2407.09590; Kornblith 2019, CKA)."""

from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.compress.units import Units, matched

# Below this mean similarity, experts are merged that are not alike.
UNLIKE = 0.3


def cka(grams: Float[Tensor, "e n n"], debiased: bool = True) -> Float[Tensor, "e e"]:
    """Linear centred kernel alignment of every two experts, from the Gram matrices of their outputs on the same n
    tokens.

    HSIC(i, j) / sqrt(HSIC(i, i) HSIC(j, j)), unchanged by rotations and by scale of either side. With `debiased`, HSIC
    is the unbiased estimator (Song 2012, Eq. 5), whose mean is 0 for unrelated features at any n and which may fall a
    little below 0; else that of centred matrices, which is biased upwards where n is not far above the number of
    features. An expert whose outputs do not vary is like no other one, and like itself.

    Raises: ValueError for fewer than 2 tokens, or 4 with `debiased`.
    """
    n, least = grams.shape[-1], 4 if debiased else 2
    if n < least:
        raise ValueError(f"n={n} tokens, allowed for this estimator: at least {least}")
    centred = (_without_bias if debiased else _centred)(grams.double())
    products = torch.einsum("iab,jab->ij", centred, centred)
    own = products.diagonal().clamp(min=0).sqrt()
    alike = products / (own[:, None] * own[None, :]).clamp(min=torch.finfo(torch.float64).tiny)
    return alike.fill_diagonal_(1)


def _centred(grams: Float[Tensor, "e n n"]) -> Float[Tensor, "e n n"]:
    """H K H, H = 1 - 11'/n."""
    return grams - grams.mean(-1, keepdim=True) - grams.mean(-2, keepdim=True) + grams.mean((-2, -1), keepdim=True)


def _without_bias(grams: Float[Tensor, "e n n"]) -> Float[Tensor, "e n n"]:
    """The U-centred matrices, whose inner products are n (n - 3) times the unbiased estimator (Szekely 2014, Eq.
    2.1)."""
    n = grams.shape[-1]
    kernel = grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))
    rows = kernel.sum(-1, keepdim=True) / (n - 2)
    centred = kernel - rows - rows.mT + kernel.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    return centred - torch.diag_embed(centred.diagonal(dim1=-2, dim2=-1))


def output_cka(outputs: Float[Tensor, "e n d"], debiased: bool = True) -> Float[Tensor, "e e"]:
    """CKA of what the experts answer to the same n tokens, gates left out."""
    wide = outputs.double()
    return cka(wide @ wide.mT, debiased)


def output_cosine(outputs: Float[Tensor, "e n d"]) -> Float[Tensor, "e e"]:
    """Mean over tokens of the cosine of two experts' outputs: what CKA does not see, a rotation makes it low. A token
    to which an expert answers 0 counts as 0, but for the expert itself."""
    unit = torch.nn.functional.normalize(outputs.double(), dim=-1)
    return (torch.einsum("ind,jnd->ij", unit, unit) / outputs.shape[1]).fill_diagonal_(1)


def weight_cosine(experts: list[Units], aligned: bool = True) -> Float[Tensor, "e e"]:
    """Cosine of all weights of two experts; `aligned` puts the hidden units of one in the order of the other's first,
    without which a copy with its units in another order has a cosine near 0.

    Raises: ValueError where widths differ.
    """
    if len({expert.shape for expert in experts}) > 1:
        raise ValueError(f"experts of shapes {[tuple(e.shape) for e in experts]}, allowed: all alike")
    flat = [torch.nn.functional.normalize(expert.double().flatten(), dim=0) for expert in experts]
    alike = torch.eye(len(experts), dtype=torch.float64, device=experts[0].device)
    for i in range(len(experts)):
        for j in range(i):
            other = flat[j].view_as(experts[j])
            other = other[matched(experts[i], experts[j])] if aligned else other
            alike[i, j] = alike[j, i] = flat[i] @ other.flatten()
    return alike


def weight_cka(experts: list[Units], d_model: int, debiased: bool = True) -> Float[Tensor, "e e"]:
    """CKA of every matrix of two experts, averaged: the d_model inputs of in-projections, and the outputs of the
    out-projection, are the samples, hidden units the features. The order of the units does not matter."""
    parts = zip(*(expert.double().split(d_model, dim=1) for expert in experts), strict=True)
    each = [cka(torch.stack([matrix.T @ matrix for matrix in part]), debiased) for part in parts]
    return torch.stack(each).mean(0)


def output_distance(means: Float[Tensor, "e d"]) -> Float[Tensor, "e e"]:
    """Minus the Euclidean distance of the experts' mean outputs (Chen 2025, HC-SMoE, arXiv:2410.08589)."""
    return -torch.cdist(means.double(), means.double(), compute_mode="donot_use_mm_for_euclid_dist")


def to_others(alike: Float[Tensor, "e e"]) -> list[float]:
    """Every expert's mean similarity to the others; 1 for a single expert."""
    n = len(alike)
    return [1.0] if n < 2 else ((alike.sum(1) - alike.diagonal()) / (n - 1)).tolist()


def mean_similarity(alike: Float[Tensor, "e e"]) -> float:
    """Mean over the pairs of different experts; 1 for a single expert."""
    return fmean(to_others(alike))
