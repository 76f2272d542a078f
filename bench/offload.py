"""A model several times larger than the memory it may use, continued token by token under a hard limit: ours, exact and
mixed, beside transformers with accelerate's offloading to disk and llama.cpp; and what mixed precision costs a trained
model.

python -m bench.offload [--quick] [--json PATH] [--llama-cpp PYTHON]; needs 15 GB where temporary files go (TMPDIR), 23
with llama.cpp, on a disk that forgets what it has read (no tmpfs)."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cold_files import disk_speed, make_cold
from bench.harness import Row, Times, arguments, compare, report
from bench.limits import limited
from bench.offload_side import prompt
from bench.small_mixtral import TRAINED, drawn, trained
from moestro.cli.offload import SHARES
from moestro.cli.offloading import WAITING
from moestro.ops import native

# 6.1 GB of experts
LARGE = {"hidden_size": 1536, "intermediate_size": 3072, "num_hidden_layers": 14, "num_local_experts": 16}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_local_experts": 8}
# what the interpreter, its libraries, activations and pages of files take besides weights
BESIDES = 3 << 28
LLAMA = {"BF16": "llama.cpp, BF16", "Q4_0": "llama.cpp, Q4_0"}
NAMES = {"exact": "ours", "accelerate": "accelerate disk offload", "mixed": "ours, mixed int4", **LLAMA}
# who stands beside whom: the same weights, and few bits
PAIRS = {"exact": ("accelerate", "BF16", "mixed"), "mixed": ("accelerate", "Q4_0")}
MEASURES = (
    ("decode a token", "seconds", "ms", 1e3),
    ("prefill 8 tokens", "prefill", "ms", 1e3),
    ("from the disk, a token", "disk", "MiB", 2**-20),
    ("from the disk, prefill", "prefill_disk", "MiB", 2**-20),
)
Found = dict[str, list[dict[str, Any]]]


def sides(
    folder: Path, memory: int, tokens: int, plan: dict[str, float], options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """What runs each contestant once, with every file that it reads cold; `plan` is the mixed one's."""
    common = ["--tokens", str(tokens), "--threads", str(options.threads)]

    def cold(pattern: str, command: list[str], python: str = sys.executable, **variables: str) -> Any:
        make_cold(folder.parent.glob(pattern))
        return limited(command, memory + BESIDES, python, **variables)

    def tensors(side: str, **variables: str) -> Callable[[], Any]:
        command = ["-m", "bench.offload_side", side, str(folder), "--memory", str(memory), *common]
        return lambda: cold("*/*.safetensors", [*command, "--plan", json.dumps(plan)], **variables)

    # as the command line runs it
    own = dict([WAITING])
    found = {"exact": tensors("exact", **own), "accelerate": tensors("accelerate"), "mixed": tensors("mixed", **own)}
    if options.llama_cpp:
        said = ",".join(map(str, prompt(TRAINED["vocab_size"])[0].tolist()))
        for kind in LLAMA:
            path = folder.with_name(f"{kind}.gguf")
            converting = ["-m", "bench.llama_cpp_side", "convert", str(folder), str(path), "--type", kind]
            limited(converting, 1 << 40, options.llama_cpp)
            command = ["-m", "bench.llama_cpp_side", "run", str(path), "--prompt", said, *common]
            found[kind] = lambda command=command: cold("*.gguf", command, options.llama_cpp)
    return found


def speeds(
    folder: Path, memory: int, options: argparse.Namespace, rounds: int, tokens: int
) -> tuple[list[Row], list[str]]:
    """Times and bytes from the disk, in interleaved rounds of processes; refuses to compare different texts."""
    common = [str(folder), "--memory", str(memory), "--tokens", "32", "--threads", str(options.threads)]
    limited(["-m", "bench.offload_side", "store", *common], 1 << 40)
    plan = limited(["-m", "bench.offload_side", "profile", *common], 1 << 40)
    contestants = sides(folder, memory, tokens, plan, options)
    found: Found = {side: [] for side in contestants}
    for _ in range(rounds):
        for side, run in contestants.items():
            found[side].append(run())
    if found["exact"][0]["tokens"] != found["accelerate"][0]["tokens"]:
        sys.exit("exact tokens differ from those of transformers with accelerate; nothing is reported")
    kinds = {one["limit"] for runs in found.values() for one in runs}
    case = f"{_gib(_size(folder))} in {_gib(memory)} + {_gib(BESIDES)}"
    return [*rows_of(case, found), disk_row(folder)], [
        f"limit: {', '.join(sorted(kinds))}, weights {memory >> 20} MiB and {BESIDES >> 20} MiB besides",
        f"mixed, as profiled on another text: {', '.join(f'{k} {plan[k]:.3g}' for k in ('t1', 't2', 'low_share'))}",
        *(
            []
            if native.available()
            else ["compiled kernels: absent (python -m moestro.ops.native.build), int4 is decoded"]
        ),
        *([] if options.llama_cpp else ["llama.cpp: absent (--llama-cpp PYTHON, with llama-cpp-python and gguf)"]),
    ]


def rows_of(case: str, found: Found) -> list[Row]:
    """Every contestant beside its peers."""
    rows = []
    for mine, peers in PAIRS.items():
        for what, key, unit, scale in MEASURES:
            named = {"ours" if side == mine else NAMES[side]: side for side in (mine, *peers) if side in found}
            # a page at least, for ratios: what fits into memory is not read again
            least = 4096 if unit == "MiB" else 0
            times: Times = {n: [scale * max(least, one[key]) for one in found[side]] for n, side in named.items()}
            rows += compare(case, what if mine == "exact" else f"{what}, mixed int4", times, unit)
    return rows


def disk_row(folder: Path) -> Row:
    """What the disk gives one thread that reads a cold file in order, past the page cache and through it."""
    path = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    direct, cached = (disk_speed(path, kind) / 1e6 for kind in (True, False))
    ratio = direct / cached
    return Row("this disk", "read a file", "MB/s", direct, "through the page cache", cached, ratio, (ratio, ratio))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def cost(folder: Path, options: argparse.Namespace, steps: int, tokens: int) -> list[Row]:
    """Perplexity of a trained model in mixed precision (calibrated, thresholds profiled on other text) beside exact."""
    from moestro.offload.codecs import CODECS
    from moestro.offload.running import quality
    from moestro.offload.scorer import Precision
    from moestro.offload.session import Plan, Session
    from moestro.offload.trace import read_trace
    from moestro.offload.tuning import profile_thresholds

    path, held_out = trained(folder / "trained", options.seed, steps)
    with Session(path, Plan(1 << 40)) as session:
        with session.recording(folder / "trained.jsonl"):
            calibration = session.calibrate(held_out[:2048])
        size = session.memory.size((0, 0), Precision.HIGH)
        memory = session.resident + 9 * size
    thresholds = profile_thresholds(read_trace(folder / "trained.jsonl"), *SHARES)
    rows = []
    for name in ("int4", "int2"):
        plan = Plan(memory, CODECS[name], 0.25, thresholds)
        with Session(path, plan, store=folder / f"low-{name}", calibration=calibration) as session:
            found = quality(session, held_out[4096 : 4096 + tokens])
        ratio = found["perplexity_exact"] / found["perplexity"]
        case, exact = f"trained, mixed {name}, 9 of 32 experts in memory", found["perplexity_exact"]
        rows.append(Row(case, "perplexity", "", found["perplexity"], "exact", exact, ratio, (ratio, ratio)))
    return rows


def main() -> None:
    options = arguments(__doc__ or "", {"llama-cpp": "interpreter that has llama-cpp-python and gguf"})
    with tempfile.TemporaryDirectory(prefix="moestro-offload-") as temporary:
        folder = Path(temporary)
        rows = cost(folder, options, steps=40 if options.quick else 500, tokens=64 if options.quick else 512)
        large = drawn(folder / "large", SMALL if options.quick else LARGE, options.seed)
        rounds, tokens = (2, 4) if options.quick else (3, 8)
        rows_of_speed, said = speeds(large, _size(large) // 5, options, rounds, tokens)
    report("bench/offload.py", [*rows_of_speed, *rows], options, said)


if __name__ == "__main__":
    main()
