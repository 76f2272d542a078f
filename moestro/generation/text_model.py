"""A causal model and its tokenizer, ready to continue text."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from moestro.generation.continuation import Continuation, Options


class PromptTooLong(ValueError):
    """A prompt that leaves no room for the tokens that are asked for."""


class TextModel:
    """Continues prompts with a `transformers` causal model and its tokenizer.

    `context` is the most tokens of prompt and continuation together, None where the model knows no limit; `ends` are
    the tokens that end a text: those of the model's generation settings and the tokenizer's.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.ends = _ends(model, tokenizer)
        self.forward_options: Mapping[str, Any] = _forward_options(model)

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with those that the tokenizer puts before every text.

        Raises: ValueError where the text has none, or is none.
        """
        return self._encoded(text, add_special_tokens=True)

    def encode_rendered(self, text: str) -> list[int]:
        """The tokens of a text that already holds its special tokens, as a chat template writes it."""
        return self._encoded(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special ones have none."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def room(self, prompt: Sequence[int], wanted: int | None, default: int | None) -> int:
        """How many tokens may follow `prompt`: `wanted`; where None, `default` or what the context leaves.

        Raises: PromptTooLong where the prompt fills the context, or leaves less than is wanted.
        """
        if self.context is None:
            if wanted is None and default is None:
                raise ValueError("this model has no longest context: say how many tokens to generate at most")
            return wanted or default or 1
        left = self.context - len(prompt)
        if left < (wanted or 1):
            raise PromptTooLong(
                f"the prompt has {len(prompt):,} tokens and {wanted or 1:,} new ones are asked for, "
                f"more than the model's context of {self.context:,} together"
            )
        return wanted or min(left, default or left)

    def begin(self, prompt: Sequence[int], options: Options) -> Continuation:
        """A continuation of `prompt` that has not taken a step yet.

        Raises: PromptTooLong; ValueError for a token that the model does not know.
        """
        self.room(prompt, options.max_new_tokens, None)
        vocabulary = self.model.config.get_text_config().vocab_size
        if bad := [token for token in prompt if not 0 <= token < vocabulary]:
            raise ValueError(f"token {bad[0]} in the prompt; allowed: 0 to {vocabulary - 1}")
        return Continuation(self, prompt, options)

    def _encoded(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            # halves of surrogate pairs: what JSON may hold, and what Python makes of bytes that are no text
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not valid Unicode text at character {error.start}") from error
        tokens = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
        if not tokens:
            raise ValueError("the prompt is empty; allowed: at least one token")
        return tokens


def _forward_options(model: Any) -> dict[str, Any]:
    """Logits of the last token alone, where the model can: those of a prompt can be larger than the model. No cache
    where the model's tokens depend on later ones."""
    keeps = getattr(getattr(model, "generation_config", None), "use_cache", None)
    options: dict[str, Any] = {"use_cache": keeps is not False}
    return options | ({"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {})


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*(of_model if isinstance(of_model, list | tuple) else [of_model]), tokenizer.eos_token_id]
    return frozenset(token for token in found if token is not None)
