"""What a recipe can set about training: plain values, checked when made."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moestro.parallel.settings import ParallelSettings
from moestro.train.schedules import Cosine, Schedule

Precision = Literal["fp32", "bf16"]
NonFinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class Budget:
    """How long to train: exactly one of optimizer steps, target tokens, or useful training FLOPs (3 x forward)."""

    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            got = ", ".join(f"{k}={v}" for k, v in given.items()) or "none"
            raise ValueError(f"budget needs exactly one of steps, tokens, flops; got {got}")
        if not self.total > 0:
            raise ValueError(f"budget {self.unit}={self.total}: must be above 0")

    @property
    def unit(self) -> Literal["steps", "tokens", "flops"]:
        """What the budget counts."""
        return "steps" if self.steps is not None else "tokens" if self.tokens is not None else "flops"

    @property
    def total(self) -> float:
        """The budget in its unit."""
        return getattr(self, self.unit)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose full name matches the regular expression `pattern` (re.search): learning rate times `lr_scale`,
    and a weight decay of their own where given. The first group that matches wins."""

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"group pattern={self.pattern!r} is not a regular expression: {error}") from error
        require_not_negative("group", lr_scale=self.lr_scale, weight_decay=self.weight_decay or 0.0)


@dataclass(frozen=True)
class OptimSettings:
    """AdamW (Loshchilov 2019, arXiv:1711.05101), its schedule, and the global norm to which gradients are clipped
    (`clip`, None for no clipping). `skipped_rows` says what becomes of the moments of rows that a step did not touch,
    where gradients are sparse (see `RowAdamW`); with `fused_rows` their values are never written down: backward leaves
    their factors, and each row is summed when it is updated."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float | None = 1.0
    schedule: Schedule = field(default_factory=Cosine)
    groups: tuple[ParameterGroup, ...] = ()
    skipped_rows: Literal["keep", "decay"] = "keep"
    fused_rows: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "groups", tuple(self.groups))
        require_not_negative("optim", weight_decay=self.weight_decay)
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim {name}={getattr(self, name)}: must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim betas={list(self.betas)}: allowed are two numbers in [0, 1)")
        if self.skipped_rows not in ("keep", "decay"):
            raise ValueError(f"optim skipped_rows={self.skipped_rows!r}: allowed are 'keep', 'decay'")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"optim clip={self.clip}: must be above 0, or null for no clipping")


@dataclass(frozen=True)
class TrainSettings:
    """One training run. `batch_size` sequences make one optimizer step, in `accumulate` micro-batches. Evaluation reads
    `eval_tokens` of the held-out text (all of it where None) every `eval_every` steps and at the end; 0 means only at
    the end, likewise for `save_every`. `keep_best` also saves at every evaluation that improves on the best one.

    Tables that train by rows: with `table_precision` bf16 they and Adam's first moment are kept in bfloat16, rounded
    stochastically (`ops.rounding`); arithmetic stays in float32. With `table_folder` they and all their state are in
    files mapped into memory, in that folder (relative: of the run folder): for tables that are larger than memory.

    A step whose loss, objectives or gradient norm is not finite ends the run (`non_finite` stop), or is counted, logged
    and changes neither weights nor what rules remember (skip), `most_skipped` such steps in a row at most. With `spike`
    so does one whose loss or gradient norm is more than so many times the mean of those before it.

    A run that is estimated to need more memory than there is does not begin (`check_memory`)."""

    budget: Budget
    optim: OptimSettings = field(default_factory=OptimSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 0
    precision: Precision = "fp32"
    table_precision: Precision = "fp32"
    table_folder: Path | None = None
    compile: bool = False
    recompute: bool = False
    non_finite: NonFinite = "stop"
    spike: float | None = None
    most_skipped: int = 10
    eval_every: int = 100
    eval_tokens: int | None = None
    save_every: int = 100
    keep_last: int = 2
    keep_best: bool = True
    tensorboard: bool = True
    check_memory: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "keep_last", "eval_tokens", "most_skipped"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train {name}={value}: must be at least 1")
        require_not_negative("train", eval_every=self.eval_every, save_every=self.save_every, seed=self.seed)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train accumulate={self.accumulate} does not divide batch_size={self.batch_size}: "
                "micro-batches are equal slices of a step's batch"
            )
        for name in ("precision", "table_precision"):
            if getattr(self, name) not in ("fp32", "bf16"):
                raise ValueError(f"train {name}={getattr(self, name)!r}: allowed are 'fp32', 'bf16'")
        if self.non_finite not in ("stop", "skip"):
            raise ValueError(f"train non_finite={self.non_finite!r}: allowed are 'stop', 'skip'")
        if self.spike is not None and not self.spike > 1:
            raise ValueError(f"train spike={self.spike}: must be above 1, times what is usual, or null")
        self._check_warmup_fits()

    @property
    def micro_batch(self) -> int:
        """Sequences that go through the model together."""
        return self.batch_size // self.accumulate

    def _check_warmup_fits(self) -> None:
        warmup = self.optim.schedule.warmup
        if self.budget.steps is not None and warmup >= 1 and warmup >= self.budget.steps:
            raise ValueError(
                f"schedule warmup={warmup:g} steps leaves nothing of budget steps={self.budget.steps}; "
                "give fewer steps, or a share of the budget below 1"
            )


def require_not_negative(where: str, **values: float) -> None:
    """Raises: ValueError naming the value that is below 0."""
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{where} {name}={value}: must not be negative")
