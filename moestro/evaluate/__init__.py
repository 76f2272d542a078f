"""Floor 8: what a trained model is worth, and how it uses its experts."""

from moestro.evaluate.generalization_report import generalization_report
from moestro.evaluate.knobs import knobs, quality_curve
from moestro.evaluate.passes import capacity_report, requested_capacity
from moestro.evaluate.perplexity import evaluate
from moestro.evaluate.probing import expert_probe
from moestro.evaluate.purity import expert_purity
from moestro.evaluate.routing_report import routing_report
from moestro.evaluate.token_sample import sample_text, token_sample

__all__ = [
    "capacity_report",
    "evaluate",
    "expert_probe",
    "expert_purity",
    "generalization_report",
    "knobs",
    "quality_curve",
    "requested_capacity",
    "routing_report",
    "sample_text",
    "token_sample",
]
