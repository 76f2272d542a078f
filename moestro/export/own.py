"""Runs of our own models: what goes into their folder, in our own layout or in a stock architecture's."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig

from moestro.data import load_tokenizer
from moestro.export.card import Facts, card, portable
from moestro.export.modeling import MoestroForCausalLM
from moestro.export.opening import configured
from moestro.export.remote_code import AUTO_MAP, remote_code
from moestro.export.stock import stock_model, verify
from moestro.export.tensors import Stored
from moestro.export.tokenizers import fast_tokenizer, save_tokenizer
from moestro.formats.writer import Outgoing
from moestro.model.active import total_parameters
from moestro.recipe.load import Recipe
from moestro.train.durable import write_text


class OwnContents:
    """What goes into the folder of a run of our own: tensors that stream from `checkpoint`, configurations, tokenizer,
    card, and in our own layout the code. No model is built, but to compare the logits of a stock architecture.

    Raises: CheckpointError for a damaged checkpoint; ExportError where no stock architecture says the model.
    """

    def __init__(self, recipe: Recipe, run: Path, checkpoint: Path, layout: str, dtype: torch.dtype | None) -> None:
        self.recipe, self.run, self.stock = recipe, run, layout == "stock"
        with torch.device("meta"):
            self.model = MoestroForCausalLM(configured(recipe, load_tokenizer(run / "tokenizer").vocab_size))
        self.stored = Stored(checkpoint, self.model)
        self.step, self.weights = self.stored.state["step"], self.stored.state["sha256"]["model.safetensors"]
        self.n_parameters, self.causal = total_parameters(self.model), self.model.decoder.causal
        self.config: PreTrainedConfig = self.model.config
        self.architecture, self.tensors = type(self.model).__name__, list[Outgoing]()
        if self.stock:
            stock = stock_model(self.model.config, self.stored)
            self.config, self.architecture, self.tensors = stock.config, stock.architecture, stock.outgoing(dtype)
        else:
            self.tensors = [self.stored.outgoing(name, dtype) for name in self.stored]
        self.config.dtype = dtype or torch.float32
        self.config.architectures = [self.architecture]

    def companions(self, path: Path, facts: Facts) -> None:
        """Everything but weights: configurations, tokenizer, card and code."""
        eos = load_tokenizer(self.run / "tokenizer").eos_id
        if not self.stock:
            self.config.auto_map = AUTO_MAP
            for name, source in remote_code(self.model.config.construction or {}).items():
                write_text(path / name, source)
            self.config.recipe = portable(self.recipe.resolved)
        self.config.update({"eos_token_id": eos, "pad_token_id": eos})
        self.config.save_pretrained(path)
        use_cache = {} if self.causal else {"use_cache": False}
        GenerationConfig(eos_token_id=eos, pad_token_id=eos, **use_cache).save_pretrained(path)
        save_tokenizer(fast_tokenizer(self.run / "tokenizer", self.recipe.data.value("seq_len")), path)
        write_text(path / "README.md", card(self.recipe, facts))

    def verify(self, path: Path) -> None:
        """Compare the written folder with the run, where it is of another architecture.

        Raises: ExportError where they differ.
        """
        if self.stock:
            verify(path, self.stored, self.model)
