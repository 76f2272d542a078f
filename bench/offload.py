"""A model several times larger than the memory it may use, continued token by token under a hard limit: ours, exact and
mixed, beside transformers with accelerate's offloading to disk; and what mixed precision costs a trained model.

python -m bench.offload [--quick] [--json PATH]; needs 7 GB where temporary files go (TMPDIR)."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.harness import Row, Times, arguments, compare, report
from bench.limits import limited
from bench.small_mixtral import drawn, trained

# 2.7 GB of experts
LARGE = {"hidden_size": 1536, "intermediate_size": 3072, "num_hidden_layers": 6, "num_local_experts": 16}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_local_experts": 8}
# what the interpreter, its libraries and activations take besides weights
BESIDES = 3 << 29
SIDES = {"exact": "ours", "accelerate": "accelerate disk offload", "mixed": "ours, mixed int4"}


def speeds(folder: Path, memory: int, options: argparse.Namespace, rounds: int, tokens: int) -> tuple[list[Row], str]:
    """Seconds a token and bytes a token, in interleaved rounds of processes; refuses to compare different texts."""
    common = ["--memory", str(memory), "--tokens", str(tokens), "--threads", str(options.threads)]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    limited(["-m", "bench.offload_side", "store", str(folder), *common], 1 << 40)
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(limited(["-m", "bench.offload_side", side, str(folder), *common], memory + BESIDES))
    if found["exact"][0]["tokens"] != found["accelerate"][0]["tokens"]:
        sys.exit("exact tokens differ from those of transformers with accelerate; nothing is reported")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    case = f"{size / 2**30:.2f} GiB in {memory / 2**30:.2f} GiB"
    rows = []
    for what, key, scale in (("decode a token", "seconds", 1e3), ("prefill 8 tokens", "prefill", 1e3)):
        times: Times = {name: [scale * one[key] for one in found[side]] for side, name in SIDES.items()}
        rows += compare(case, what, times)
    mine = found["exact"][0]["bytes"] / 2**20
    for side in ("accelerate", "mixed"):
        theirs = found[side][0]["bytes"] / 2**20
        ratio = theirs / mine if mine else float("inf")
        rows.append(Row(case, "bytes moved a token", "MiB", mine, SIDES[side], theirs, ratio, (ratio, ratio)))
    kind = {one["limit"] for side in found.values() for one in side}
    return rows, f"limit: {', '.join(sorted(kind))}, weights {memory >> 20} MiB and {BESIDES >> 20} MiB besides"


def cost(folder: Path, options: argparse.Namespace, steps: int, tokens: int) -> list[Row]:
    """Perplexity of a trained model in mixed precision (int4, calibrated, T1 0.6, T2 0.9) beside exact."""
    from moestro.offload.codecs import CODECS
    from moestro.offload.running import quality
    from moestro.offload.scorer import Precision, Thresholds
    from moestro.offload.session import Plan, Session

    path, held_out = trained(folder / "trained", options.seed, steps)
    with Session(path, Plan(1 << 40)) as session:
        calibration = session.calibrate(held_out[:2048])
        size = session.memory.size((0, 0), Precision.HIGH)
        memory = session.resident + 9 * size
    rows = []
    for name in ("int4", "int2"):
        plan = Plan(memory, CODECS[name], 0.25, Thresholds(0.6, 0.9))
        with Session(path, plan, store=folder / f"low-{name}", calibration=calibration) as session:
            found = quality(session, held_out[4096 : 4096 + tokens])
        ratio = found["perplexity_exact"] / found["perplexity"]
        case, exact = f"trained, mixed {name}, 9 of 32 experts in memory", found["perplexity_exact"]
        rows.append(Row(case, "perplexity", "", found["perplexity"], "exact", exact, ratio, (ratio, ratio)))
    return rows


def main() -> None:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory(prefix="moestro-offload-") as temporary:
        folder = Path(temporary)
        rows = cost(folder, options, steps=40 if options.quick else 500, tokens=64 if options.quick else 512)
        drawn(folder / "large", SMALL if options.quick else LARGE, options.seed)
        experts = sum(path.stat().st_size for path in (folder / "large").glob("*.safetensors"))
        memory, rounds, tokens = experts * 2 // 7, 1 if options.quick else 3, 4 if options.quick else 8
        rows_of_speed, limit = speeds(folder / "large", memory, options, max(2, rounds), tokens)
    report("bench/offload.py", [*rows_of_speed, *rows], options, [limit])


if __name__ == "__main__":
    main()
