"""How far training has come."""

from dataclasses import dataclass

from moestro.train.settings import Budget
from moestro.train.step import Measured

# sound steps whose means are what is usual
USUAL = 100


@dataclass
class Counters:
    """Everything that accumulates over a run. FLOPs are of training (3 x forward); `seconds` is time spent in optimizer
    steps; `metrics_bytes` and `metrics_sha256` are those of metrics.jsonl at the last checkpoint; `skipped` counts the
    steps that were not sound and changed nothing, of which the last `skipped_in_a_row` followed one another;
    `usual_loss` and `usual_norm` (of gradients) are running means over `usual_over` sound steps."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    flops_computed: float = 0.0
    active_params_sum: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    last_eval: dict[str, float] | None = None
    seconds: float = 0.0
    metrics_bytes: int = 0
    metrics_sha256: str = ""
    skipped: int = 0
    skipped_in_a_row: int = 0
    usual_loss: float = 0.0
    usual_norm: float = 0.0
    usual_over: int = 0

    def add(self, measured: Measured) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.tokens += measured.tokens
        self.flops += measured.flops
        self.flops_computed += measured.flops_computed
        self.active_params_sum += measured.active_params

    def settle(self, measured: Measured) -> None:
        """Take a sound step into what is usual: the mean of all so far, then one that forgets."""
        self.usual_over = min(self.usual_over + 1, USUAL)
        self.usual_loss += (measured.loss - self.usual_loss) / self.usual_over
        self.usual_norm += (measured.grad_norm - self.usual_norm) / self.usual_over

    def share(self, budget: Budget) -> float:
        """Share of the budget that is used; above 1 where the last step went beyond it."""
        used = {"steps": self.step, "tokens": self.tokens, "flops": self.flops}[budget.unit]
        return used / budget.total

    def evaluated(self, figures: dict[str, float]) -> bool:
        """Take note of an evaluation after the current step; True where its loss is the lowest so far."""
        self.last_eval = figures
        if self.best_loss is not None and figures["loss"] >= self.best_loss:
            return False
        self.best_step, self.best_loss = self.step, figures["loss"]
        return True
