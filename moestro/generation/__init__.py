"""Floor 11: continues text with a causal model, token by token: what `generate` prints and `serve` streams."""

from moestro.generation.continuation import Continuation, Options, Piece
from moestro.generation.sampling import Sampling
from moestro.generation.text_model import PromptTooLong, TextModel
from moestro.generation.text_stream import StopFilter, TextStream

__all__ = [
    "Continuation",
    "Options",
    "Piece",
    "PromptTooLong",
    "Sampling",
    "StopFilter",
    "TextModel",
    "TextStream",
]
