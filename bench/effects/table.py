"""Results of a study as Markdown: where they come from, the effects, and the loss of every arm."""

import statistics
from collections.abc import Mapping
from typing import Any

from bench.effects.effect import RULE, verdict
from moestro.compare.numerals import mean_and_spread


def effects_summary(result: Mapping[str, Any]) -> str:
    """What `python -m bench.summary` prints of the results of a study."""
    return "\n".join([source(result), "", *effect_lines(result), "", *arm_lines(result)])


def source(result: Mapping[str, Any]) -> str:
    """One paragraph: script, commit, machine, seeds, budget, corpora, the rule."""
    machine, study = result["machine"], result["study"]
    commits = ", ".join(f"`{commit[:12]}`" for commit in result["commit"].split(", "))
    corpora = ", ".join(
        f"{name} ({facts['bytes'] / 1e6:.1f} MB, {facts['fingerprint'][:12]})"
        for name, facts in result["corpora"].items()
    )
    return (
        f"`{result['script']}` at commit {commits}, {len(result['runs'])} runs of "
        f"{study['budget']:.3g} useful training FLOPs each, seeds {', '.join(map(str, result['seeds']))}, "
        f"{corpora}; {machine['cpu']}, torch {machine['torch']}, Python {machine['python']}. Mean ± standard deviation "
        f"over seeds; {RULE}."
    )


def effect_lines(result: Mapping[str, Any]) -> list[str]:
    """One line for every effect and corpus."""
    lines = [
        "| effect | claim | quantity | corpus | expected | measured | 95 % interval | holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        interval = "–" if row["interval"] is None else f"{row['interval'][0]:.3g} to {row['interval'][1]:.3g}"
        measured = mean_and_spread(row["measured"], row["spread"]).replace("\N{NO-BREAK SPACE}", " ")
        lines.append(
            f"| {row['effect']} | {row['claim']} | {row['quantity']} | {row['corpus']} | {expected(row['expected'])} | "
            f"{measured} | {interval} | {verdict(row['interval'], row['expected'])} |"
        )
    return lines


def expected(bounds: tuple[float | None, float | None]) -> str:
    """The expected range in words."""
    low, high = bounds
    if low is None:
        return "any" if high is None else f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"


def arm_lines(result: Mapping[str, Any]) -> list[str]:
    """Loss, tokens and active parameters of every arm on every corpus."""
    lines = ["| arm | corpus | bits per byte | training tokens | active parameters |", "|---|---|---|---|---|"]
    cells = dict.fromkeys((run["arm"], run["corpus"]) for run in result["runs"])
    for arm, corpus in cells:
        runs = [run for run in result["runs"] if (run["arm"], run["corpus"]) == (arm, corpus)]
        losses = [run["bpb"] for run in runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else None
        loss = mean_and_spread(statistics.fmean(losses), spread).replace("\N{NO-BREAK SPACE}", " ")
        tokens, active = (statistics.fmean(run[key] for run in runs) for key in ("tokens", "params_active"))
        lines.append(f"| {arm} | {corpus} | {loss} | {tokens / 1e3:.0f}k | {active / 1e3:.1f}k |")
    return lines
