"""Models of the library transformers: loaded, seen as our layers over the same tensors, continued, and made faster.

Importing this package registers our grouped operation under the name `moestro`:
`AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moestro")`.
"""

from moestro.hf.expertless import load_without_experts
from moestro.hf.experts import MOESTRO, experts_modules, intercepted
from moestro.hf.hosted import Hosted
from moestro.hf.load import checked, load, skeleton
from moestro.hf.tokenizers import tokenizer_of
from moestro.hf.view import dense_view, view
from moestro.hf.whole import Whole, stored_tensors

__all__ = [
    "MOESTRO",
    "Hosted",
    "Whole",
    "checked",
    "dense_view",
    "experts_modules",
    "intercepted",
    "load",
    "load_without_experts",
    "skeleton",
    "stored_tensors",
    "tokenizer_of",
    "view",
]
