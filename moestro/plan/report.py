"""A plan for a terminal, as JSON values, and as the YAML to paste."""

from typing import Any

from rich.console import Group
from rich.table import Table

from moestro.plan.search import FULL, Found, first_of_each_mesh, fits
from moestro.plan.spread import Spread
from moestro.plan.timing import StepTime
from moestro.plan.workload import Workload, training_flops
from moestro.recipe.syntax import dump_yaml

GB = 1e9
SHOWN = 5
DAY = 86_400


def name_of(spread: Spread) -> str:
    """The mesh in words: shards x copies, ranks of experts."""
    parts = [f"{spread.shards} shards" if spread.shards > 1 else "whole"]
    if spread.copies > 1:
        parts.append(f"{spread.copies} copies")
    if spread.experts > 1:
        parts.append(f"experts on {spread.experts}")
    if spread.work.tables and spread.world > 1:
        parts.append(f"tables by {spread.settings.tables}")
    return ", ".join(parts) if spread.world > 1 else "one process"


def to_paste(spread: Spread) -> str:
    """The sections of a recipe that make it run so."""
    settings = spread.settings
    train = {"accumulate": spread.accumulate, "recompute": spread.recompute}
    if spread.world == 1:
        return dump_yaml({"train": train})
    parallel: dict[str, Any] = {"sharding": settings.sharding, "reshard": settings.reshard}
    parallel |= {"replicas": settings.replicas} if settings.replicas > 1 else {}
    parallel |= {"experts": settings.experts} if settings.experts > 1 else {}
    parallel |= {"tables": settings.tables} if spread.work.tables else {}
    return dump_yaml({"parallel": parallel, "train": train})


def days(spread: Spread) -> float:
    """How long the recipe's whole budget takes."""
    budget, step = spread.work.settings.budget, StepTime(spread).total
    each = {
        "steps": 1.0,
        "tokens": float(spread.work.tokens),
        "flops": spread.work.tokens * training_flops(spread.work, False),
    }
    return budget.total / each[budget.unit] * step / DAY


def figures(spread: Spread) -> dict[str, Any]:
    """One spread as JSON values: bytes, seconds."""
    time = StepTime(spread)
    return {
        "mesh": name_of(spread),
        "parallel": {key: value for key, value in vars(spread.settings).items() if value is not None},
        "accumulate": spread.accumulate,
        "recompute": spread.recompute,
        "micro_batch": spread.micro_batch,
        "memory": {**spread.memory, "total": spread.total},
        "sent": time.sent,
        "seconds": {
            "compute": time.compute,
            "waiting": time.waiting,
            "optimizer": time.optimizer,
            "step": time.total,
        },
        "tokens_per_second": time.tokens_per_second,
        "days": days(spread),
        "imbalance": vars(spread.balance),
    }


def as_figures(work: Workload, machine: str, world: int, found: Found) -> dict[str, Any]:
    """The whole plan as JSON values."""
    return {
        "recipe": work.name,
        "machine": machine,
        "ranks": world,
        "parameters": {"dense": work.dense, "experts": work.experts, "tables_bytes": work.table_bytes},
        "fitting": [figures(each) for each in found.best(SHOWN)],
        "too_large": [figures(each) for each in found.nearest(SHOWN)],
        "refused": found.refused,
        "as_is": found.asked and {**figures(found.asked), "fits": fits(found.asked)},
    }


def plan_page(work: Workload, found: Found) -> Group:
    """The best few spreads, the parts of the best one's memory and messages, what does not fit and why, and YAML."""
    parts: list[Any] = [] if found.asked is None else [_asked(found.asked)]
    if best := found.best(SHOWN):
        parts += [_best_table(best), _parts_table(best[0]), f"\nFor the recipe:\n\n{to_paste(best[0])}"]
    if nearest := found.nearest(SHOWN) or ([] if best else first_of_each_mesh(found.too_large, SHOWN)):
        parts.append(_too_large_table(nearest))
    parts += [f"{what}: {why}" for what, why in found.refused.items()]
    return Group(*parts)


def _asked(spread: Spread) -> str:
    verdict = "fits" if fits(spread) else "does not fit"
    there = f"{verdict} {FULL * spread.machine.memory / GB:.1f} GB"
    return f"as the recipe is ({name_of(spread)}, {micro_batches(spread)}): {spread.total / GB:.1f} GB a rank, {there}"


def _best_table(best: list[Spread]) -> Table:
    table = Table(title="the fastest that fit (estimates: docs/parallel.md says what they assume)")
    table.add_column("mesh")
    for column in ("micro-batches", "GB a rank", "GB sent", "s a step", "tokens/s", "days"):
        table.add_column(column, justify="right")
    for each in best:
        time = StepTime(each)
        sent, rate = sum(time.sent.values()) / GB, time.tokens_per_second
        numbers = f"{each.total / GB:.1f}", f"{sent:.2f}", f"{time.total:.3g}", f"{rate:.3g}", f"{days(each):.3g}"
        table.add_row(name_of(each), micro_batches(each), *numbers)
    return table


def micro_batches(spread: Spread) -> str:
    """How many, of how many sequences a rank, and how they save memory."""
    saving = ", recomputed" if spread.recompute else ""
    saving += ", gathered once" if spread.world > 1 and not spread.settings.reshard else ""
    return f"{spread.accumulate} x {spread.micro_batch}{saving}"


def _parts_table(spread: Spread) -> Table:
    time = StepTime(spread)
    seconds = {"computing": time.compute, "waiting": time.waiting, "optimizer": time.optimizer}
    table = Table(title=f"{name_of(spread)}: a rank's memory, what it sends in a step, and where the time goes")
    for column in ("memory", "GB", "sent", "GB ", "time", "s"):
        table.add_column(column, justify="right" if column.strip() in ("GB", "s") else "left")
    columns = [
        [(name, f"{size / GB:.2f}") for name, size in spread.memory.items() if size],
        [(name, f"{size / GB:.3f}") for name, size in time.sent.items() if size],
        [(name, f"{each:.3g}") for name, each in seconds.items()],
    ]
    for row in range(max(map(len, columns))):
        table.add_row(*(cell for column in columns for cell in (column[row] if row < len(column) else ("", ""))))
    return table


def _too_large_table(nearest: list[Spread]) -> Table:
    table = Table(title="what does not fit, the least over first")
    for column in ("mesh", "micro-batches", "GB a rank", "GB there", "largest part"):
        table.add_column(column, justify="right" if column.startswith("GB") else "left")
    for each in nearest:
        largest, size = max(each.memory.items(), key=lambda item: item[1])
        there = FULL * each.machine.memory
        table.add_row(
            name_of(each),
            micro_batches(each),
            f"{each.total / GB:.1f}",
            f"{there / GB:.1f}",
            f"{largest}, {size / GB:.1f} GB",
        )
    return table
