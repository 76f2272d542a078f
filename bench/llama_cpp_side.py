"""llama.cpp as a contestant of `bench.offload`: turns a Mixtral-class folder into GGUF, then continues the prompt with
the weights mapped, in a process of its own under the limit. Runs in an interpreter that has llama-cpp-python and gguf;
of this repository it uses `bench.limits` alone.

python -m bench.llama_cpp_side convert FOLDER OUT.gguf --type BF16|Q4_0
python -m bench.llama_cpp_side run MODEL.gguf --prompt 1,2,3 --tokens 8 --threads 2
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.limits import enter, read_from_disk

CONTEXT = 64
Shape = tuple[int, ...]


class Folder:
    """Tensors of a folder in bfloat16, as the 16 bits of each number."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, json.loads((folder / "config.json").read_text())
        self.index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def __call__(self, name: str) -> np.ndarray:
        path = self.folder / self.index[name]
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))[name]
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            return np.frombuffer(file.read(end - begin), np.uint16).reshape(entry["shape"])


def tensors(folder: Folder) -> Iterator[tuple[str, Shape, Callable[[], np.ndarray]]]:
    """Names and shapes as llama.cpp wants them, and what reads each one."""
    config = folder.config
    d, w, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    experts, kv = config["num_local_experts"], config["num_key_value_heads"]
    yield "token_embd.weight", (config["vocab_size"], d), lambda: folder("model.embed_tokens.weight")
    yield "output_norm.weight", (d,), lambda: folder("model.norm.weight")
    yield "output.weight", (config["vocab_size"], d), lambda: folder("lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        stem, out = f"model.layers.{layer}", f"blk.{layer}"
        yield f"{out}.attn_norm.weight", (d,), lambda s=stem: folder(f"{s}.input_layernorm.weight")
        yield f"{out}.ffn_norm.weight", (d,), lambda s=stem: folder(f"{s}.post_attention_layernorm.weight")
        for part, n in (("q", heads), ("k", kv), ("v", 0), ("output", 0)):
            theirs = f"{stem}.self_attn.{part[0]}_proj.weight"
            yield f"{out}.attn_{part}.weight", (d, d), lambda t=theirs, n=n: paired(folder(t), n)
        moe = f"{stem}.block_sparse_moe"
        yield f"{out}.ffn_gate_inp.weight", (experts, d), lambda m=moe: folder(f"{m}.gate.weight")
        for name, theirs, shape in (("gate", "w1", (w, d)), ("up", "w3", (w, d)), ("down", "w2", (d, w))):
            each = [f"{moe}.experts.{expert}.{theirs}.weight" for expert in range(experts)]
            yield f"{out}.ffn_{name}_exps.weight", (experts, *shape), lambda e=each: np.stack([*map(folder, e)])


def paired(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Queries' and keys' rows in the order of llama.cpp's rotation, which turns neighbours; 0 heads: as they are."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape) if heads else matrix


def convert(folder: Folder, path: Path, kind: str) -> None:
    """Write a GGUF: matrices in `kind`, norms and routers in float32; one tensor in memory at a time."""
    import gguf

    types = gguf.GGMLQuantizationType
    writer, chosen = gguf.GGUFWriter(path, "llama"), []
    describe(writer, folder.config)
    for name, shape, read in tensors(folder):
        plain = len(shape) == 1 or "gate_inp" in name
        kept = types.F32 if plain else types.BF16 if "token_embd" in name or "output" == name[:6] else types[kind]
        size = (*shape[:-1], shape[-1] // gguf.GGML_QUANT_SIZES[kept][0] * gguf.GGML_QUANT_SIZES[kept][1])
        dtype = np.float32 if kept is types.F32 else np.uint8
        writer.add_tensor_info(name, shape if plain else size, np.dtype(dtype), int(np.prod(size)), kept)
        chosen.append((kept, read))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for kept, read in chosen:
        bits = read()
        if kept is types.BF16:
            writer.write_tensor_data(np.ascontiguousarray(bits).view(np.uint8))
        else:
            numbers = (bits.astype(np.uint32) << 16).view(np.float32)
            writer.write_tensor_data(numbers if kept is types.F32 else gguf.quantize(numbers, kept))
    writer.close()


def describe(writer: Any, config: dict[str, Any]) -> None:
    """The keys by which llama.cpp knows a Mixtral without a tokenizer."""
    heads = config["num_attention_heads"]
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def run(path: Path, prompt: list[int], tokens: int, threads: int) -> dict[str, Any]:
    """Greedy tokens, seconds and bytes from the disk as `bench.offload_side` gives them."""
    import llama_cpp as api

    api.llama_backend_init()
    plan = api.llama_model_default_params()
    # mapped, and never copied into another layout: that would be the whole model in memory
    plan.load_mode, plan.use_extra_bufts, plan.n_gpu_layers = api.LLAMA_LOAD_MODE_MMAP, False, 0
    model = api.llama_model_load_from_file(str(path).encode(), plan)
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = CONTEXT, threads, threads
    context = api.llama_init_from_model(model, settings) if model else None
    if context is None:
        raise RuntimeError(f"llama.cpp cannot open {path}")
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    marks, found, given = [(time.perf_counter(), read_from_disk())], [], prompt
    for _ in range(tokens):
        # a batch points at its tokens: they have to live until it is computed
        ids = (ctypes.c_int32 * len(given))(*given)
        if api.llama_decode(context, api.llama_batch_get_one(ids, len(given))):
            raise RuntimeError("llama.cpp could not compute a token")
        found.append(int(np.argmax(api.llama_get_logits_ith(context, -1)[:vocabulary])))
        given = found[-1:]
        marks.append((time.perf_counter(), read_from_disk()))
    (start, before), (first, between), (last, after) = marks[0], marks[1], marks[-1]
    timed = {"prefill": first - start, "prefill_disk": between - before, "seconds": (last - first) / (tokens - 1)}
    return {"tokens": found, **timed, "disk": (after - between) / (tokens - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    making, running = kinds.add_parser("convert"), kinds.add_parser("run")
    making.add_argument("folder", type=Path)
    making.add_argument("out", type=Path)
    making.add_argument("--type", choices=("BF16", "Q4_0"), default="BF16")
    running.add_argument("model", type=Path)
    running.add_argument("--prompt", required=True)
    running.add_argument("--tokens", type=int, required=True)
    running.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    if options.kind == "convert":
        convert(Folder(options.folder), options.out, options.type)
        print("{}")
        return
    limit = enter()
    prompt = [int(token) for token in options.prompt.split(",")]
    print(json.dumps({"limit": limit, **run(options.model, prompt, options.tokens, options.threads)}))


if __name__ == "__main__":
    main()
