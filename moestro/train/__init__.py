"""Floor 8: the training loop, its optimizer, checkpoints and rules."""

from moestro.train.adaptive_experts import AdaptiveExperts
from moestro.train.checkpoint import CheckpointError
from moestro.train.environment import describe_machine
from moestro.train.expert_dropout import ExpertDropout
from moestro.train.folder import RunFolder, RunFolderError
from moestro.train.gate_sparsity import GateSparsity
from moestro.train.health import Diverged
from moestro.train.loop import train
from moestro.train.progress import Bar, Display, Lines, Silent, display_on
from moestro.train.row_adamw import RowAdamW
from moestro.train.rules import BiasBalance, QueryNormStatistics, Rule
from moestro.train.schedules import WSD, Constant, Cosine, Schedule
from moestro.train.settings import Budget, OptimSettings, ParameterGroup, TrainSettings
from moestro.train.signals import TrainingStopped
from moestro.train.steer_threshold import SteerThreshold
from moestro.train.weights import best_checkpoint, load_weights, newest_checkpoint

__all__ = [
    "WSD", "AdaptiveExperts", "Bar", "BiasBalance", "Budget", "CheckpointError", "Constant", "Cosine",
    "Display", "ExpertDropout", "GateSparsity", "Lines", "Diverged", "OptimSettings", "ParameterGroup",
    "QueryNormStatistics", "RowAdamW", "Rule", "RunFolder", "RunFolderError", "Schedule", "Silent",
    "SteerThreshold", "TrainSettings", "TrainingStopped", "best_checkpoint", "describe_machine", "display_on",
    "load_weights", "newest_checkpoint", "train",
]  # fmt: skip
