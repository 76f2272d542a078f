"""Floor 6: what a trained model is worth, and how it uses its experts."""

from moestro.evaluate.perplexity import evaluate
from moestro.evaluate.routing_report import routing_report
from moestro.evaluate.token_sample import token_sample

__all__ = ["evaluate", "routing_report", "token_sample"]
