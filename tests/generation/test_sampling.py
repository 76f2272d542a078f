"""The choice of a token: against the definition written out, and its bounds."""

import math

import pytest
import torch

from moestro.generation import Sampling

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0, 0.5])


def frequencies(sampling: Sampling, draws: int = 4000) -> list[float]:
    generator = sampling.generator()
    counts = [0] * len(LOGITS)
    for _ in range(draws):
        counts[sampling.choose(LOGITS, generator)] += 1
    return [count / draws for count in counts]


def expected(temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """Loops over tokens, likeliest first: k of them, then until their probabilities reach p."""
    order = sorted(range(len(LOGITS)), key=lambda token: -float(LOGITS[token]))[: top_k or len(LOGITS)]
    weights = {token: math.exp(float(LOGITS[token]) / temperature) for token in order}
    total = sum(weights.values())
    kept, reached = {}, 0.0
    for token in order:
        if kept and reached >= top_p:
            break
        kept[token] = weights[token] / total
        reached += kept[token]
    scale = sum(kept.values())
    return [kept.get(token, 0.0) / scale for token in range(len(LOGITS))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, 1.0),
        (2.5, None, 1.0),
        (1.0, 3, 1.0),
        (1.0, None, 0.7),
        (0.7, 4, 0.9),
        (1.0, None, 0.0),
        (1.0, 1, 1.0),
    ],
)
def test_draws_follow_the_definition(temperature: float, top_k: int | None, top_p: float) -> None:
    wanted = expected(temperature, top_k, top_p)
    found = frequencies(Sampling(temperature, top_p, top_k, seed=3))
    for share, probability in zip(found, wanted, strict=True):
        # five standard errors of 4,000 draws; what may not be drawn never is
        assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / 4000)


def test_temperature_0_takes_the_first_of_the_likeliest() -> None:
    assert Sampling().choose(LOGITS, Sampling().generator()) == 1


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    def drawn(seed: int | None) -> list[int]:
        sampling = Sampling(1.0, seed=seed)
        generator = sampling.generator()
        return [sampling.choose(LOGITS, generator) for _ in range(64)]

    assert drawn(5) == drawn(5) != drawn(6)
    assert drawn(-1) == drawn(-1) and drawn(None) != drawn(None)


def test_logits_that_are_no_numbers_are_refused() -> None:
    sampling = Sampling(1.0)
    with pytest.raises(ArithmeticError, match="not finite"):
        sampling.choose(torch.tensor([0.0, math.nan]), sampling.generator())
    assert sampling.choose(torch.tensor([-math.inf, 0.0]), sampling.generator()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1; allowed: 0 "),
        ({"temperature": math.nan}, "temperature=nan; allowed"),
        ({"top_p": 1.1}, "top_p=1.1; allowed: 0 to 1"),
        ({"top_k": 0}, "top_k=0; allowed: at least 1"),
        ({"seed": 2**63}, "allowed: whole numbers of 64 bits"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
