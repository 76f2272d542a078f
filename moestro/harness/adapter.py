"""An opened model as `lm-eval` calls models."""

import logging
from typing import Any

import torch
from lm_eval.models import huggingface

from moestro.model.causality import looking_ahead

# it warns of every model that is open already, and of every cut context, which are counted here
logging.getLogger("lm_eval").setLevel(logging.ERROR)
# the decorator that registers it hides its type
HFLM: Any = huggingface.HFLM


class ScoredModel(HFLM):
    """`lm-eval`'s own wrapper of `transformers` models around one that is open already.

    Log probabilities are computed in float32 at least. Contexts that do not fit are cut from the left, as `lm-eval`
    does, and counted in `n_cut` of `n_scored`. A model whose tokens see later ones is given no padding.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8, max_length: int | None = None) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=1 if looking_ahead(model) else batch_size,
            max_length=max_length,
            softmax_dtype=torch.promote_types(model.dtype, torch.float32),
        )
        self.n_cut = self.n_scored = 0
        self._windows: Any = None
        # what does not fit is cut here, so its warning of an error to come is wrong
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether it is the likeliest; bars for the model's work only."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log probability of each text, in windows of the whole context."""
        from tqdm import tqdm

        with tqdm(desc="Running loglikelihood windows", unit=" windows") as self._windows:
            found = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._windows = None
        return found

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for strings, read, scored in requests:
            context, continuation = strings or ("", "")
            self._check(context, continuation, len(read), len(scored))
        # a call for every few windows of long texts, one for everything else
        rolling = self._windows is not None
        found = super()._loglikelihood_tokens(requests, disable_tqdm=rolling, override_bs=override_bs)
        if rolling:
            self._windows.update(len(requests))
        return found

    def _check(self, context: str, continuation: str, read: int, scored: int) -> None:
        self.n_scored += 1
        self.n_cut += read + scored > self.max_length + 1
        if not scored:
            raise ValueError(f"the continuation {continuation!r} after ...{context[-40:]!r} has no tokens of its own")
        if scored > self.max_length:
            raise ValueError(
                f"a continuation of {scored:,} tokens ({continuation[:40]!r}...) does not fit into the model's "
                f"context of {self.max_length:,}"
            )
