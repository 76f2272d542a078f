"""REAP here and by llm-compressor: the same checkpoint, the same text; quality, time and memory.

    python -m bench.compression_peers --peer PYTHON [--checkpoint FOLDER] [--text FILE] [--held-out FILE] [--quick]

PYTHON is the interpreter of an environment with llmcompressor, which asks for other versions of transformers and
compressed-tensors than we do. Without a checkpoint, a small Mixtral is trained on the bytes of the text first.
Times are of a process each: reading the folder, calibration, pruning, writing. Perplexity is that of the experts each
side keeps; theirs are taken from its report, because its folder names tensors as its own version of transformers does.
Windows are the same but for the text's last one, shorter than the others, which we alone read.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.effects.corpora import DATA
from bench.harness import ROOT, Row, report
from moestro.compress.applied import applied, layer_number
from moestro.compress.methods import Request
from moestro.compress.plan import LayerPlan
from moestro.compress.plan_file import read_plan
from moestro.compress.running import compressed
from moestro.compress.text import batches_of
from moestro.data import Batch, ByteTokenizer
from moestro.evaluate import evaluate

WINDOW, RATIO = 128, 0.25
PEER = "llm-compressor"


def main(words: list[str] | None = None) -> list[Row]:
    """Run both sides, print and return the rows."""
    options = arguments(words)
    if options.side:
        print(json.dumps(ours(request_of(options, options.side), options.out)))
        return []
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = options.checkpoint or trained(folder / "source", options)
        rows = compared(options, source, folder)
    report("bench/compression_peers.py", rows, options)
    return rows


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The options of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="interpreter of an environment with llmcompressor")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a stock folder with a tokenizer")
    parser.add_argument("--text", type=Path, default=DATA / "lm" / "wikitext-2" / "train.txt", help="to calibrate on")
    parser.add_argument(
        "--held-out", type=Path, default=DATA / "lm" / "wikitext-2" / "valid.txt", help="to evaluate on"
    )
    parser.add_argument("--tokens", type=int, default=32_768, help="of the text, and of the held-out text")
    parser.add_argument("--steps", type=int, default=300, help="of training where there is no checkpoint")
    parser.add_argument("--quick", action="store_true", help="few steps and tokens: shows that it works")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each side")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.quick:
        options.steps, options.tokens = 3, 2048
    if not options.side and not options.peer:
        parser.error("--peer: say which python has llmcompressor")
    return options


def request_of(options: argparse.Namespace, source: Path, text: Path | None = None) -> Request:
    """What is asked of us."""
    return Request(source, "reap", RATIO, text=str(text or options.text), tokens=options.tokens, seq_len=WINDOW)


def trained(folder: Path, options: argparse.Namespace) -> Path:
    """A Mixtral of 8 experts, trained for some steps on the bytes of the text."""
    from transformers import MixtralConfig, MixtralForCausalLM

    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MixtralConfig(
        vocab_size=ByteTokenizer.vocab_size + 7, num_local_experts=8, num_key_value_heads=4, **small,
        max_position_embeddings=WINDOW, output_router_logits=True, router_aux_loss_coef=0.01,
        bos_token_id=None, eos_token_id=ByteTokenizer.eos_id,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    data = torch.frombuffer(bytearray(options.text.read_bytes()[:4_000_000]), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps)
    for _ in range(options.steps):
        starts = torch.randint(len(data) - WINDOW, (16, 1), generator=generator)
        tokens = data[starts + torch.arange(WINDOW)]
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


def ours(request: Request, destination: Path) -> dict[str, Any]:
    """One compression, and what it took; the libraries are imported before the clock runs, as on the other side."""
    importlib.import_module("moestro.compress.measured")
    importlib.import_module("moestro.hf")
    started = time.perf_counter()
    folder = compressed(request, destination)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    plan = read_plan(folder / "compression_plan.json")
    return {"seconds": seconds, "mebibytes": peak, "kept": [list(layer.keep) for layer in plan.layers]}


def compared(options: argparse.Namespace, source: Path, folder: Path) -> list[Row]:
    """Both sides on one checkpoint and the same windows."""
    windows = folder / "windows.json"
    batches = batches_of(request_of(options, source))
    whole = [
        row.tolist() for batch in batches for row, keep in zip(batch.tokens, batch.keep, strict=True) if keep.all()
    ]
    windows.write_text(json.dumps(whole))
    mine = process([sys.executable, "-m", "bench.compression_peers", "--side", source, "--out", folder / "ours",
                    "--text", options.text, "--tokens", options.tokens], options.threads)  # fmt: skip
    script = ROOT / "bench" / "llm_compressor_reap.py"
    theirs = process([options.peer, script, source, folder / "theirs", windows, RATIO], options.threads)
    held_out = batches_of(request_of(options, source, options.held_out))
    before, after = (perplexity(path, held_out) for path in (source, folder / "ours"))
    peer = perplexity(source, held_out, theirs["kept"])
    same = sum(a == b for a, b in zip(mine["kept"], theirs["kept"], strict=True))
    print(f"perplexity before {before:.3f}; {same} of {len(mine['kept'])} layers keep the same experts")
    # the ratio of perplexities, which a difference near 0 does not blow up
    above = [100 * (found / before - 1) for found in (after, peer)]
    figures = [
        ("perplexity above the whole model's", "%", *above, peer / after),
        *((what, unit, mine[key], theirs[key], theirs[key] / mine[key])
          for what, unit, key in (("time", "s", "seconds"), ("peak memory", "MiB", "mebibytes"))),
    ]  # fmt: skip
    case = f"REAP, {RATIO:.0%} of experts"
    return [Row(case, what, unit, a, PEER, b, ratio, (ratio, ratio)) for what, unit, a, b, ratio in figures]


def process(command: list[Any], threads: int) -> dict[str, Any]:
    """The JSON of a command's last line.

    Raises: RuntimeError with what it said where it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def perplexity(folder: Path, batches: list[Batch], kept: list[list[int]] | None = None) -> float:
    """Of a folder's model on held-out windows, with these experts of every mixture layer alone where they are given."""
    from moestro.hf import Hosted, load

    model = Hosted(load(folder))
    layers = model.moe_layers()
    pairs = [] if kept is None else zip(layers.items(), kept, strict=True)
    plans = [LayerPlan(layer_number(n), layer.router.n_experts, tuple(keep)) for (n, layer), keep in pairs]
    return evaluate(applied(model, plans), batches)["perplexity"]


if __name__ == "__main__":
    main()
