"""Bytes that one rank sends in an optimizer step: a formula for each kind of message.

g ranks of a group; n bytes of the whole tensor; t tokens of a rank's micro-batch; d the model's width; k rows a token.
"""

import math
from collections.abc import Sequence

FLOAT32, FLOAT64, ID = 4, 8, 8


def all_gather(n_bytes: float, ranks: int) -> float:
    """Every rank has n / g and gets all: each part is passed on g - 1 times, n (g - 1) / g."""
    return n_bytes * (ranks - 1) / ranks


def reduce_scatter(n_bytes: float, ranks: int) -> float:
    """The reverse of `all_gather`: n (g - 1) / g."""
    return n_bytes * (ranks - 1) / ranks


def all_reduce(n_bytes: float, ranks: int) -> float:
    """Both, one after the other: 2 n (g - 1) / g."""
    return 2 * n_bytes * (ranks - 1) / ranks


def gathers(accumulate: int, reshard: bool) -> int:
    """How often a block's weights are gathered in a step of so many micro-batches: once, and, where a forward pass
    forgets them, again in every backward pass (which keeps them for the next micro-batch)."""
    return 1 + accumulate if reshard else 1


def ranks_met(rows: float, shares: Sequence[float], n_experts: float = math.inf) -> float:
    """Other ranks that a token is expected to meet, of ranks that get these shares of all rows: mean over its own rank
    o of sum_(r != o) 1 - q_r. A token misses a rank with share p when each of its k different experts, of n equally
    likely ones, lies elsewhere: q = product over i < k of (n (1 - p) - i) / (n - i); (1 - p)^k for countless ones."""
    each = sum(1 - _missed(rows, share, n_experts) for share in shares)
    return each * (len(shares) - 1) / len(shares)


def _missed(rows: float, share: float, n_experts: float) -> float:
    if math.isinf(n_experts):
        return (1 - share) ** rows
    elsewhere, chance = n_experts * (1 - share), 1.0
    for drawn in range(math.ceil(min(rows, n_experts))):
        # of a fraction of a row, a fraction of its power
        chance *= max(0.0, (elsewhere - drawn) / (n_experts - drawn)) ** min(1.0, rows - drawn)
    return chance


def expert_exchange(
    tokens: float,
    d_model: int,
    rows: float,
    shares: Sequence[float],
    itemsize: int,
    n_experts: float = math.inf,
    forwards: int = 1,
) -> float:
    """Of one layer with experts on other ranks, forward (f times: twice where it is recomputed) and backward: a token
    goes once to every rank that has some of its experts, and an answer comes back, with both gradients: 2 (f + 1) m d
    numbers for m other ranks. Of every row that leaves its rank, f times a code (8 bytes) and its gate (4), and the
    gate's gradient (4); and f times two counts for every rank."""
    others = len(shares) - 1
    away = rows * sum(share * others / len(shares) for share in shares) / max(1e-12, sum(shares))
    vectors = 2 * (forwards + 1) * ranks_met(rows, shares, n_experts) * d_model * itemsize
    return tokens * (vectors + away * (forwards * (ID + FLOAT32) + FLOAT32)) + forwards * 2 * ID * others


def table_rows_exchange(
    tokens: float, d_model: int, rows: float, ranks: int, itemsize: int, tables: int = 2, forwards: int = 1
) -> float:
    """Of one layer whose tables are split by rows: what `expert_exchange` says of ranks with equal shares, however many
    tables there are; but a single one, of values, has no gradient of x to send back."""
    shares = [1 / ranks] * ranks
    spared = tokens * ranks_met(rows, shares) * d_model * itemsize if tables == 1 else 0.0
    return expert_exchange(tokens, d_model, rows, shares, itemsize, forwards=forwards) - spared


def table_columns_exchange(
    tokens: float, d_model: int, rows: float, ranks: int, itemsize: int, tables: int = 2, forwards: int = 1
) -> float:
    """Of one layer whose `tables` are split by columns, each rank with d / g of every row: x and y in parts to and from
    every rank and their gradients, 2 (f + 1) t d (g - 1) / g numbers in f forward passes and one backward, of a single
    table, of values, one part less, x's gradient; f times ids and gates of all tokens to all; and sums of partial
    products with every row (t g k float32), f for each table but the one whose rows are added up, and one backward.
    """
    vectors = (2 * (forwards + 1) - (tables == 1)) * tokens * d_model * itemsize * (ranks - 1) / ranks
    told = forwards * tokens * rows * (ID + FLOAT32) * (ranks - 1)
    products = (forwards * (tables - 1) + 1) * all_reduce(tokens * ranks * rows * FLOAT32, ranks)
    return vectors + told + products


def query_statistics(features: int, ranks: int) -> float:
    """Of one pass, forward or backward, over a micro-batch: the count and sum of all ranks' queries, then their squares
    about the mean: f + 1 and f float32, all-reduced."""
    return all_reduce((2 * features + 1) * FLOAT32, ranks) if features else 0.0


def pooled_statistics(features: int, ranks: int) -> float:
    """Once a step for running statistics: count, sum and squares of all micro-batches, 2 f + 1 float64, summed."""
    return all_reduce((2 * features + 1) * FLOAT64, ranks) if features else 0.0
