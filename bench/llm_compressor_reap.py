"""REAP by llm-compressor, in the environment that has it: one JSON line of what it took. Called by compression_peers.

python bench/llm_compressor_reap.py SRC DST WINDOWS.json RATIO
"""

import json
import resource
import sys
import time
from pathlib import Path


def main() -> None:
    source, destination, windows, ratio = sys.argv[1:]
    # in this environment alone: it wants other versions of transformers than we have
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    ids = json.loads(Path(windows).read_text())
    text = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    # asked for and not used: the windows are token ids already
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    started = time.perf_counter()
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(source),
        processor=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<unk>"),
        dataset=text,
        recipe=[REAPPruningModifier(sparsity=float(ratio), report_path=f"{destination}.kept.json")],
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        moe_calibrate_all_experts=False,
        shuffle_calibration_samples=False,
        output_dir=destination,
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    kept = list(json.loads(Path(f"{destination}.kept.json").read_text()).values())
    print(json.dumps({"seconds": seconds, "mebibytes": peak, "kept": kept}))


if __name__ == "__main__":
    main()
