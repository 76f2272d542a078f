"""Tiny models of `transformers` with random weights and a byte tokenizer, for the tests of generation and serving."""

from pathlib import Path
from typing import Any

from moestro.data import ByteTokenizer
from moestro.ops.whole_files import HASHES

CONTEXT = 96


def tiny_llama(seed: int = 0, context: int = CONTEXT) -> Any:
    """A decoder of two blocks over bytes; large embeddings, so that its choices differ clearly."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.4,
        bos_token_id=256,
        eos_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


def byte_tokenizer(folder: Path) -> Any:
    """The byte tokenizer as `transformers` reads it; 256 ends a text."""
    from transformers import PreTrainedTokenizerFast

    ByteTokenizer().save(folder)
    # transformers may write its own files over these
    (folder / HASHES).unlink()
    return PreTrainedTokenizerFast.from_pretrained(folder)


def stock_folder(folder: Path, seed: int = 0) -> Path:
    """A folder as `save_pretrained` writes it, model and tokenizer."""
    byte_tokenizer(folder).save_pretrained(folder)
    tiny_llama(seed).save_pretrained(folder)
    return folder
