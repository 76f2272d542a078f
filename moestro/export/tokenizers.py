"""A run's tokenizer as transformers know tokenizers: the same ids for every text."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moestro.data.tokenizers import load_tokenizer


def fast_tokenizer(folder: Path, length: int) -> PreTrainedTokenizerFast:
    """The tokenizer that a run keeps in `folder`, for sequences of `length` tokens. As in training nothing is put
    around a text, and special tokens in it are read as plain text. Batches are padded on the left with the token that
    ends documents.

    Raises: FileNotFoundError where there is none.
    """
    own = load_tokenizer(folder)
    model = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.no_truncation()
    model.no_padding()
    model.post_processor = None  # type: ignore[assignment]
    if getattr(model.model, "dropout", None):
        model.model.dropout = None
    end = model.id_to_token(own.eos_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token=end,
        pad_token=end,
        padding_side="left",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer's files, under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
