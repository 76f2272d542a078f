"""Stochastic rounding to bfloat16: one of the two neighbours, right on average, the same wherever it is done."""

import math

import torch

from moestro.ops.rounding import rounding_key, stochastic_bfloat16

IDS = torch.arange(64)


def draw(rows=64, width=33):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def test_numbers_go_to_a_neighbour_and_those_that_are_bfloat16_stay():
    x = draw()
    down = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    up = ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    rounded = stochastic_bfloat16(x, IDS, 7)
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() == down) | (rounded.float() == up)).all()
    assert 0.4 < (rounded.float() == up).float().mean() < 0.6
    exact = x.bfloat16()
    assert torch.equal(stochastic_bfloat16(exact.float(), IDS, 7), exact)


def test_it_is_right_on_average_for_every_distance_from_a_neighbour():
    for share in (1 / 256, 0.25, 0.5, 0.9):
        step = 2.0**-7
        x = torch.full((4096, 16), 1 + share * step)
        rounded = stochastic_bfloat16(x, torch.arange(4096), 3).float()
        error = 4 * math.sqrt(share * (1 - share) / x.numel())
        assert abs(float(rounded.mean() - 1) / step - share) < error


def test_bits_do_not_repeat_over_rows_columns_or_keys():
    x = torch.full((512, 64), 1 + 2.0**-8)
    up = (stochastic_bfloat16(x, torch.arange(512), 1).float() > 1).double() - 0.5
    other = (stochastic_bfloat16(x, torch.arange(512), 2).float() > 1).double() - 0.5
    for a, b in ((up, other), (up[1:], up[:-1]), (up[:, 1:], up[:, :-1]), (up[1:, 1:], up[:-1, :-1])):
        assert abs(float((a * b).mean()) * 4) < 5 / math.sqrt(a.numel())


def test_a_row_is_rounded_the_same_in_pieces_and_far_down_the_table():
    x = draw()
    whole = stochastic_bfloat16(x, IDS, 5)
    assert torch.equal(
        torch.cat([stochastic_bfloat16(x[i : i + 7], IDS[i : i + 7], 5) for i in range(0, 64, 7)]), whole
    )
    far = stochastic_bfloat16(x, IDS + 2**32, 5)
    assert not torch.equal(far, whole)


def test_what_is_not_finite_stays_so():
    x = torch.tensor([[math.inf, -math.inf, math.nan, 0.0]])
    rounded = stochastic_bfloat16(x.expand(64, 4), IDS, 1)
    assert (rounded[:, 0] == math.inf).all() and (rounded[:, 1] == -math.inf).all()
    assert rounded[:, 2].isnan().all() and (rounded[:, 3] == 0).all()


def test_keys_differ():
    keys = {rounding_key(step, table, entry) for step in range(200) for table in range(4) for entry in range(3)}
    assert len(keys) == 2400 and all(0 <= key < 2**32 for key in keys)


def test_numbers_that_are_none_stay_so():
    """Among them the NaN that GPUs make, to whose bits nothing can be added."""
    x = torch.tensor([[0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000]], dtype=torch.int32).view(torch.float32)
    rounded = stochastic_bfloat16(x, IDS[:1], 5)
    assert rounded[0, :3].isnan().all() and rounded[0, 3] == math.inf
