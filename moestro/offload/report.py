"""What a run, a replay or a profile of offloaded experts found, for JSON and for a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from moestro.offload.policies import SINGLE, Mix, Policy
from moestro.offload.replay import Setting, budget, replay
from moestro.offload.running import Generated
from moestro.offload.session import Session
from moestro.offload.trace import Trace
from moestro.offload.tuning import prediction_accuracy, profile_thresholds, shares, tune_low_share, tune_mix


def run_report(session: Session, generated: Sequence[Generated], quality: dict[str, float] | None) -> dict[str, Any]:
    """Everything about a session: plan, speed, hits, bytes, memory of each tier, perplexity where it was measured."""
    plan = session.plan
    return {
        "model": str(session.host.path),
        "plan": {
            "memory_bytes": plan.memory,
            "low": plan.low.name if plan.low else None,
            "thresholds": asdict(plan.thresholds),
            "policy": plan.policy.name,
            "prefetch": plan.depth,
            "experts_in": "host memory" if plan.host else "files",
            "cooperative": plan.cooperative,
            "exact": plan.thresholds.exact,
        },
        "low_errors": session.low.errors if session.low else None,
        "generated": [one.as_json() for one in generated],
        "quality": quality,
        **session.figures(),
    }


def run_lines(report: dict[str, Any]) -> Iterator[str]:
    """A report in a few lines."""
    memory, counts = report["memory"], report["counts"]
    demand = {"exactly on demand: ": report["on_demand"]} if "on_demand" in report else {}
    for what, one in [*(("", each) for each in report["generated"]), *demand.items()]:
        speed = one["decode_tokens_per_second"]
        decode = "" if speed is None else f", then {speed:.2f} tokens/s, {mib(one['decode_bytes_per_token'])} a token"
        yield f"{what}{one['prompt_tokens']} tokens read in {one['prefill_seconds']:.2f} s{decode}"
    rates = ", ".join(f"{key.replace('_', ' ')} {counts[key]:.1%}" for key in RATES if counts[key] is not None)
    yield f"{counts['requests']:,} requests of experts: {rates}"
    yield (
        f"memory: {mib(memory['resident_bytes'])} besides experts, slots {mib(memory['slots_peak_bytes'])} at most, "
        f"of {mib(memory['experts_bytes']['high'])} of experts; {mib(memory['host_bytes'])} in host memory"
    )
    if memory["tables_bytes"]:
        yield f"rows: {mib(memory['rows_bytes'])} in memory, of {mib(memory['tables_bytes'])} of tables"
    if quality := report["quality"]:
        yield (
            f"perplexity {quality['perplexity']:.3f} on {quality['tokens']} tokens, exact "
            f"{quality['perplexity_exact']:.3f} ({quality['perplexity_change']:+.2%})"
        )


RATES = ("hit_rate_high", "hit_rate_low", "low_share", "skip_share")


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.1f} MiB"


def replay_report(trace: Trace, setting: Setting, policies: Sequence[Policy], tune: bool) -> dict[str, Any]:
    """A trace through one cache under several policies, and under the mix tuned on it where `tune` says so."""
    found = {p.name: (p, replay(trace, _with(setting, p))) for p in policies}
    if tune:
        mix, _ = tune_mix(trace, setting)
        found["tuned mix"] = mix, replay(trace, _with(setting, mix))
    return {
        "trace": trace.header.model,
        "complete": trace.complete,
        "steps": len(trace.steps),
        "capacity_bytes": {precision.name.lower(): size for precision, size in setting.capacity.items()},
        "thresholds": asdict(setting.thresholds),
        "prefetch": setting.depth,
        "policies": {
            name: {"weights": p.weights if isinstance(p, Mix) else None, **result.as_json()}
            for name, (p, result) in found.items()
        },
    }


def _with(setting: Setting, policy: Policy) -> Setting:
    return Setting(
        setting.capacity, policy, setting.thresholds, setting.depth, setting.cooperative, setting.per_sequence
    )


def replay_table(report: dict[str, Any]) -> Table:
    """A row for every policy."""
    table = Table(title=f"{report['trace']}: {report['steps']:,} steps" + ("" if report["complete"] else ", cut off"))
    columns = ("policy", "hits high", "hits low", "misses high", "misses low", "skips", "penalty", "MiB moved")
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, row in report["policies"].items():
        weights = row["weights"] if name not in SINGLE and name != "mix" else None
        label = name if weights is None else f"{name} ({', '.join(f'{w:.3g}' for w in weights)})"
        rates = ["-" if row[key] is None else f"{row[key]:.1%}" for key in ("hit_rate_high", "hit_rate_low")]
        moved = (row["demanded"] + row["fetched_ahead"]) / 2**20
        numbers = [f"{row[key]:,}" for key in ("misses_high", "misses_low", "skips")]
        table.add_row(label, *rates, *numbers, f"{row['penalty']:,.2f}", f"{moved:,.1f}")
    return table


def profile_report(trace: Trace, high: float, low: float, memory: int | None = None) -> dict[str, Any]:
    """Thresholds for shares of HIGH and LOW on a trace, and how well it predicts the layers ahead; with the `memory`
    for slots also the share of it for LOW copies, and what then moves beside exact loading.

    Raises: ValueError where the memory does not hold an expert.
    """
    found = profile_thresholds(trace, high, low)
    report = {
        "trace": trace.header.model,
        "thresholds": asdict(found),
        "shares": shares(trace, found),
        "predictions": prediction_accuracy(trace),
    }
    if memory is None:
        return report
    exact = replay(trace, Setting(budget(trace.header, memory, 0.0))).counts
    share, moved = tune_low_share(trace, memory, Setting({}, thresholds=found))
    return {**report, "low_share": share, "bytes_per_pass": {"mixed": moved, "exact": exact.rates()["bytes_per_pass"]}}


def profile_lines(report: dict[str, Any]) -> Iterator[str]:
    """A profile in a few lines."""
    thresholds, found = report["thresholds"], report["shares"]
    asked = ", ".join(f"{name} {share:.1%}" for name, share in found.items())
    yield f"--t1 {thresholds['high']:.4g} --t2 {thresholds['low']:.4g}: {asked} of all choices"
    if "low_share" in report:
        mixed, exact = (mib(report["bytes_per_pass"][how]) for how in ("mixed", "exact"))
        yield f"--low-share {report['low_share']:.2g}: {mixed} moved a pass under lru, {exact} exactly"
    for row in report["predictions"]:
        yield (
            f"{row['distance']} layers ahead: first expert {row['first']:.1%}, among those predicted "
            f"{row['chosen']:.1%}, all chosen {row['recall']:.1%}"
        )
