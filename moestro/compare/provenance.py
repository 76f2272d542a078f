"""Where the numbers come from, how compute was counted, and what they do not show."""

from collections.abc import Mapping

from moestro.compare.looks import Look
from moestro.compare.markup import details, facts, paragraph, plain_table, scrolling
from moestro.compare.numerals import MISSING, byte_size, duration, is_number, percent, si, significant
from moestro.compare.plots import escape
from moestro.compare.table import run_rows
from moestro.compare.verdict import Verdict, budget_text, compute_spread, run_status, title_of

COUNTING = (
    "A budget is a number of useful training FLOPs. In every step they are counted from what the routers really chose "
    "(the traces of that forward pass), not from a configured number of experts: a token routed to a wider expert, or "
    "to more experts, costs more. Attention, routers and the output head are counted for every arm alike; a training "
    "step counts three times its forward pass, less what frozen weights spare. A run ends when its budget is used up, "
    "so an arm that spends less on a token sees more tokens.",
    "Computed FLOPs also contain what was executed and thrown away, such as the masked half of causal attention, "
    "padding, and rows whose result is not used. A better kernel could save the difference to the useful FLOPs.",
    "Bits per byte is the summed negative log2 likelihood of the validation text divided by its bytes of UTF-8, so "
    "that tokenizers do not matter.",
)


def _written(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_written(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_written, value))
    return MISSING if value is None else f"{value:,}" if type(value) is int and value > 99_999 else str(value)


def corpus_facts(results: Mapping) -> str:
    """Corpus, machine, commit, seeds and command."""
    corpus = results.get("corpus") or {}
    zlib = corpus.get("zlib_bpb")
    pairs = {
        "Command": results.get("command") or "not recorded",
        "Corpus": corpus.get("name") or "not recorded",
        "Corpus size": byte_size(corpus.get("bytes")),
        "Corpus fingerprint": corpus.get("fingerprint") or "not recorded",
        "zlib on this corpus": f"{zlib:.3f} bits per byte" if is_number(zlib) else "not recorded",
        "Commit": results.get("commit") or "not recorded",
        "Seeds": _written(results.get("seeds") or []) or "none",
        "Budgets": ", ".join(budget_text(budget) for budget in results["budgets"]) or "none",
        "Created": results.get("created") or "not recorded",
    }
    seconds = [run["seconds"] for run in results["runs"] if is_number(run.get("seconds"))]
    if seconds:
        pairs["Training time"] = f"{duration(sum(seconds))} in {len(seconds)} runs"
    machine = {f"Machine, {key}": _written(value) for key, value in (results.get("machine") or {}).items()}
    return facts(pairs | (machine or {"Machine": "not recorded"}))


def arms_table(results: Mapping, looks: Mapping[str, Look]) -> str:
    """What each arm is, its recipe, and the sizes that were solved from the budget."""
    rows = []
    for arm, about in results["arms"].items():
        solved = "".join(
            f"<li><code>{escape(key)}</code> = {escape(_written(value))}</li>"
            for key, value in (about.get("solved") or {}).items()
        )
        rows.append(
            f"<tr><th scope='row'>{looks[arm].name()}</th><td>{escape(about.get('description') or MISSING)}</td>"
            f"<td><code>{escape(about.get('recipe') or MISSING)}</code></td>"
            f"<td>{f'<ul>{solved}</ul>' if solved else 'nothing: as in the recipe'}</td></tr>"
        )
    head = "<tr><th>Arm</th><th>What it is</th><th>Recipe</th><th>Solved for equal compute</th></tr>"
    return scrolling(f'<table class="about"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>')


def counting(results: Mapping, verdict: Verdict) -> str:
    """How compute is counted, and how equal it came out."""
    parts = [paragraph(text) for text in COUNTING]
    spread = compute_spread(verdict)
    if spread is not None:
        parts.append(
            paragraph(
                f"Check: the useful training FLOPs of the runs compared in the headline agree within {percent(spread)}."
            )
        )
    worst = _largest_surprise(results)
    if worst is not None:
        parts.append(paragraph(worst))
    return "".join(parts)


def _largest_surprise(results: Mapping) -> str | None:
    deviations = [
        (run["used_flops_per_token"] / run["expected_flops_per_token"] - 1, run["arm"])
        for run in results["runs"]
        if is_number(run.get("used_flops_per_token"))
        and is_number(run.get("expected_flops_per_token"))
        and run["expected_flops_per_token"] > 0
    ]
    if not deviations:
        return None
    deviation, arm = max(deviations, key=lambda pair: abs(pair[0]))
    direction = "above" if deviation >= 0 else "below"
    return (
        f"Measured training FLOPs per token lie at most {percent(abs(deviation))} away from what the recipes' "
        f"configuration predicts ({title_of(results, arm)}: {direction})."
    )


def limits(results: Mapping, verdict: Verdict) -> str:
    """What a reader must not conclude, from the facts of this comparison."""
    n_seeds, n_sizes = len(results.get("seeds") or []), len(results["sizes"])
    items = [_seed_limit(n_seeds), _scale_limit(results), _wall_clock_limit(verdict)]
    if n_sizes > 1:
        items.append(
            f"In the headline every arm stands at the best of its {n_sizes} sizes, chosen on the same validation text "
            "it is scored on. All arms have that choice, but the chosen losses are slightly optimistic."
        )
    items += [
        "The optimizer settings are those of the recipes. An arm whose settings were tuned less well than another's "
        "loses here for that reason too.",
        "All arms see one corpus and one tokenizer. Another text, or another language, may order them differently, "
        "and bits per byte says nothing about tasks.",
        "The coloured text and the expert pictures show single runs. They illustrate; they are not a measurement.",
    ]
    lost = [run for run in results["runs"] if run_status(run) != "done"]
    if lost:
        items.insert(
            0,
            f"{len(lost)} of {len(results['runs'])} runs did not finish with a finite loss. The means are over the "
            "others, and survivors may look better than their arm is.",
        )
    return "<ul class='limits'>" + "".join(f"<li>{escape(item)}</li>" for item in items if item) + "</ul>"


def _seed_limit(n_seeds: int) -> str:
    if n_seeds < 2:
        return "With one seed, no difference on this page can be told from noise: run at least three."
    if n_seeds < 5:
        return (
            f"{n_seeds} seeds give a rough idea of the spread, and no more. The rule above asks for a larger gap "
            "because of that, but a small effect can still be missed."
        )
    return f"The spread is over {n_seeds} seeds (initial weights and data order); it contains no other uncertainty."


def _scale_limit(results: Mapping) -> str:
    active = [run["params_active"] for run in results["runs"] if is_number(run.get("params_active"))]
    if not active or not results["budgets"]:
        return ""
    return (
        f"These are models of {si(min(active))} to {si(max(active))} active parameters, trained with at most "
        f"{budget_text(max(results['budgets']))}. An order among small models need not hold for large ones."
    )


def _wall_clock_limit(verdict: Verdict) -> str:
    speeds = [speed for cell in verdict.ranked if (speed := cell.average("tokens_per_s"))]
    if len(speeds) < 2:
        return ""
    ratio = max(speeds) / min(speeds)
    return (
        f"Equal compute is not equal time: tokens per second differ by up to a factor of {significant(ratio, 2)} here, "
        "and that depends on kernels and machine."
    )


def runs_table(results: Mapping) -> str:
    """Every run, folded away."""
    titles = ["Arm", "Budget", "Size", "Seed", "State", "Bits/byte", "Perplexity", "Tokens"]
    titles += ["Useful FLOPs", "Computed FLOPs", "Tokens/s", "Folder"]
    rows = run_rows(results)
    return details(f"All {len(rows)} runs", plain_table(titles, rows)) if rows else ""


def setup_section(results: Mapping, verdict: Verdict, looks: Mapping[str, Look]) -> str:
    """Everything needed to judge or repeat the comparison."""
    return (
        corpus_facts(results)
        + "<h3>Arms</h3>"
        + arms_table(results, looks)
        + "<h3>How compute is counted</h3>"
        + counting(results, verdict)
        + runs_table(results)
    )
