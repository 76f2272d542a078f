"""Several processes on paper and in fact: bytes that a rank sends in a step, and how unequal experts load ranks.

No times: two processes of one CPU, whose figures are the same on every machine.

*Bytes*: two ranks (gloo) run one optimizer step's forward and backward passes of small models; collectives are counted
as they happen (`moestro.parallel.traffic`), mean of both ranks, beside the formula of `moestro plan`. Ratio: counted
over foreseen; more than 10 % off is an error.

*Imbalance*: a small HMoE is trained; largest over mean (rows x width) of a rank on the second half of its held-out
text, mean over layers, for experts placed by number (as many on each rank), by width (what is done before loads are
known), and by the loads of the first half (re-placement). Ratio: that of equal counts over ours.

    python -m bench.parallel [--quick] [--json PATH]
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bench.harness import ROOT, Row, arguments, report
from bench.processes import run_ranks
from moestro.data import Batch
from moestro.evaluate import routing_report
from moestro.evaluate.scoring import score
from moestro.parallel import ParallelSettings, Ranks
from moestro.parallel.gradients import send_after_backward, sum_gradients
from moestro.parallel.parallelize import parallelize
from moestro.parallel.traffic import Traffic
from moestro.plan import MACHINES, Spread, StepTime, workload
from moestro.plan.imbalance import EVEN, compared
from moestro.recipe.build import build_model, run_training
from moestro.recipe.evaluation import opened_run
from moestro.recipe.load import Recipe, load_recipe

WORLD = 2
VOCABULARY = 512
TABLES = "model.layers={2: {kind: moe, router: {kind: product_key, heads: 4, top_k: 8, d_key: 64, query_norm: rms}, "
TABLES += "branches: [{kind: singleton, n_experts: 4096, sparse_gradients: true}]}}"
QUERIES = TABLES.replace("query_norm: rms", "query_norm: batch")


@dataclass(frozen=True)
class Case:
    """A recipe and how it is spread."""

    name: str
    recipe: str
    settings: ParallelSettings
    changes: Sequence[str] = ()

    def load(self) -> Recipe:
        """The recipe, small."""
        changes = ("data.seq_len=64", f"data.tokenizer={{kind: bpe, vocab_size: {VOCABULARY}}}", *self.changes)
        return load_recipe(ROOT / "recipes" / f"{self.recipe}.yaml", changes)


CASES = [
    Case("dense, sharded", "dense", ParallelSettings()),
    Case("dense, sharded, gathered once", "dense", ParallelSettings(reshard=False)),
    Case("dense, sharded, 4 micro-batches", "dense", ParallelSettings(), ("train.accumulate=4",)),
    Case("dense, whole copies", "dense", ParallelSettings(sharding="none")),
    Case("HMoE, sharded", "hmoe", ParallelSettings()),
    Case("HMoE, experts on 2 ranks", "hmoe", ParallelSettings(experts=2)),
    Case("HMoE, experts on 2, 4 micro-batches", "hmoe", ParallelSettings(experts=2), ("train.accumulate=4",)),
    Case("PEER, tables by rows", "peer", ParallelSettings(tables="rows"), (TABLES,)),
    Case("PEER, tables by columns", "peer", ParallelSettings(tables="columns"), (TABLES,)),
    Case("PEER, queries normalised over 4 micro-batches", "peer", ParallelSettings(), (QUERIES, "train.accumulate=4")),
]


def spread_of(case: Case) -> Spread:
    """The case as a plan has it."""
    work = workload(case.load())
    return Spread(work, MACHINES["h200"], WORLD, case.settings, work.settings.accumulate, False, EVEN)


def counted(case: Case, folder: Path) -> dict[str, float]:
    """Bytes that a rank sends in a step by kind of collective, mean of the ranks.

    Raises: RuntimeError where a rank failed.
    """
    run_ranks(case.name, WORLD, _rank, case, folder)
    sent = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {kind: sum(each.get(kind, 0.0) for each in sent) / WORLD for kind in {*sent[0], *sent[1]}}


def _rank(rank: int, case: Case, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    recipe = case.load()
    model = build_model(recipe, VOCABULARY)
    ranks = Ranks.grouped(torch.device("cpu"), case.settings)
    parallelize(model, ranks, case.settings)
    accumulate = recipe.train.value("accumulate")
    size = recipe.train.value("batch_size") // accumulate // WORLD
    torch.manual_seed(rank)
    with Traffic() as traffic:
        for number in range(accumulate):
            send_after_backward(model, number == accumulate - 1)
            _, losses = score(model, tokens(size, recipe.data.value("seq_len")), "fp32")
            losses.mean().backward()
        sum_gradients(model.parameters(), ranks)
    (folder / f"{rank}.json").write_text(json.dumps(dict(traffic.sent)))
    dist.destroy_process_group()


def tokens(size: int, seq_len: int, vocabulary: int = VOCABULARY) -> Batch:
    """Random text."""
    text = torch.randint(vocabulary, (size, seq_len + 1))
    inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    return Batch(inputs, targets, torch.zeros_like(inputs), torch.full_like(inputs, 2))


def bytes_sent(cases: Sequence[Case]) -> list[Row]:
    """Formula and count of every case."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            measured = sum(counted(case, Path(folder)).values()) / 1e6
        foreseen = sum(StepTime(spread_of(case)).sent.values()) / 1e6
        ratio = measured / foreseen
        rows.append(Row(case.name, "sent a step", "MB", foreseen, "counted", measured, ratio, (ratio, ratio)))
    return rows


def imbalance(steps: int, n_ranks: Sequence[int]) -> list[Row]:
    """Placements of the experts of an HMoE that was trained for so many steps."""
    changes = [f"train.budget.steps={steps}", "train.eval_tokens=8192", "train.tensorboard=false"]
    recipe = load_recipe(ROOT / "recipes" / "hmoe.yaml", changes)
    with tempfile.TemporaryDirectory() as folder:
        run_training(recipe, Path(folder) / "run", show_preparation=False)
        run = opened_run(Path(folder) / "run")
        texts = list(run.held_out(65_536))
        before, after = (
            {name: layer["load"] for name, layer in routing_report(run.model, part, precision="fp32").items()}
            for part in (texts[: len(texts) // 2], texts[len(texts) // 2 :])
        )
    layers = {mixture: mixture.name.rsplit(".branches", 1)[0] for mixture in workload(recipe).mixtures}
    rows = []
    for ranks in n_ranks:
        each = [compared(mixture, ranks, before[name], after[name]) for mixture, name in layers.items()]
        mean = {way: sum(found[way] for found in each) / len(each) for way in each[0]}
        for way in ("by width", "by load"):
            ratio = mean["equal count"] / mean[way]
            case = f"HMoE after {steps} steps, {ranks} ranks, {way}"
            rows.append(
                Row(case, "imbalance", "max/mean", mean[way], "equal count", mean["equal count"], ratio, (ratio, ratio))
            )
    return rows


def main() -> None:
    options = arguments(__doc__ or "")
    rows = bytes_sent(CASES[:2] if options.quick else CASES)
    rows += imbalance(20 if options.quick else 200, (2, 4))
    report("bench/parallel.py", rows, options, said="ratio: of bytes, counted over foreseen; of imbalance, > 1: evener")
    worst = max(abs(row.ratio - 1) for row in rows if row.what == "sent a step")
    if worst > 0.1:
        sys.exit(f"a formula is off by {worst:.0%} of what was counted")


if __name__ == "__main__":
    main()
