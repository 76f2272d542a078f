"""Floor 12: how a recipe would run on machines that are not here: memory, messages, time, and the best mesh."""

from moestro.plan.fit import require_ranks_fit
from moestro.plan.machines import MACHINES, Machine, machine_named
from moestro.plan.search import Found, search
from moestro.plan.spread import Spread
from moestro.plan.timing import StepTime
from moestro.plan.workload import Workload, workload

__all__ = [
    "MACHINES", "Found", "Machine", "Spread", "StepTime", "Workload", "machine_named", "require_ranks_fit", "search",
    "workload",
]  # fmt: skip
