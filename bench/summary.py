"""Print the rows of result files as Markdown tables, for docs/performance.md, docs/effects.md and docs/reliability.md.

python -m bench.summary bench/results/FILE.json ...
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.effects.table import effects_summary
from bench.reliability.figures import reliability_summary


def summary(path: Path) -> str:
    """Where the numbers come from, and one line for every row."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if "figures" in result:
        return reliability_summary(result)
    return effects_summary(result) if path.name.startswith("effects-") else timing_summary(result)


def timing_summary(result: Mapping[str, Any]) -> str:
    """The lines of a benchmark that measures time and memory."""
    machine = result["machine"]
    lines = [
        f"`{result['script']}` at commit `{result['commit']}`, seed {result['seed']}, {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}, load average "
        f"{machine['load']:.1f} at the end:",
        "",
        "| case | what | ours | peer | theirs | ratio | 10th to 90th percentile |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ours, theirs = (f"{row[side]:.1f} {row['unit']}" for side in ("ours", "theirs"))
        spread = f"{row['spread'][0]:.2f} to {row['spread'][1]:.2f}"
        lines.append(
            f"| {row['case']} | {row['what']} | {ours} | {row['peer']} | {theirs} | {row['ratio']:.2f} | {spread} |"
        )
    return "\n".join(lines)


def main() -> None:
    print("\n\n".join(summary(Path(name)) for name in sys.argv[1:]))


if __name__ == "__main__":
    main()
