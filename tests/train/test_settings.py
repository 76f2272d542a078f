"""Settings that make no sense are refused with what, got and allowed."""

import pytest

from moestro.train import Budget, Cosine, OptimSettings, ParameterGroup, TrainSettings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(), "budget needs exactly one of steps, tokens, flops; got none"),
        (lambda: Budget(steps=3, flops=1e9), r"exactly one of steps, tokens, flops; got steps=3, flops=1000000000\.0"),
        (lambda: Budget(tokens=0), "budget tokens=0: must be above 0"),
        (lambda: Budget(flops=float("nan")), "budget flops=nan: must be above 0"),
        (lambda: ParameterGroup("("), r"group pattern='\(' is not a regular expression"),
        (lambda: ParameterGroup("x", lr_scale=-1.0), r"group lr_scale=-1\.0: must not be negative"),
        (lambda: OptimSettings(lr=0.0), r"optim lr=0\.0: must be above 0"),
        (lambda: OptimSettings(weight_decay=-1.0), r"optim weight_decay=-1\.0: must not be negative"),
        (lambda: OptimSettings(betas=(0.9, 1.0)), r"optim betas=\[0\.9, 1\.0\]: allowed are two numbers in \[0, 1\)"),
        (lambda: OptimSettings(clip=0.0), r"optim clip=0\.0: must be above 0, or null"),
        (lambda: settings(batch_size=0), "train batch_size=0: must be at least 1"),
        (lambda: settings(batch_size=6, accumulate=4), "accumulate=4 does not divide batch_size=6"),
        (lambda: settings(precision="fp16"), "precision='fp16': allowed are 'fp32', 'bf16'"),
        (lambda: settings(save_every=-1), "save_every=-1: must not be negative"),
        (lambda: settings(keep_last=0), "keep_last=0: must be at least 1"),
        (
            lambda: settings(budget=Budget(steps=10), optim=OptimSettings(schedule=Cosine(warmup=10))),
            "warmup=10 steps leaves nothing of budget steps=10",
        ),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def settings(**changes) -> TrainSettings:
    return TrainSettings(**{"budget": Budget(steps=20), **changes})


def test_lists_from_a_recipe_become_tuples():
    optim = OptimSettings(betas=[0.8, 0.9], groups=[ParameterGroup("x")])  # type: ignore[arg-type]
    assert optim.betas == (0.8, 0.9)
    assert optim.groups == (ParameterGroup("x"),)


def test_budget_knows_its_unit():
    assert (Budget(flops=1e9).unit, Budget(flops=1e9).total) == ("flops", 1e9)
