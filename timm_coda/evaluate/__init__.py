"""Evaluate explanations: explainers, metrics, and a resumable run that scores each explainer by each metric."""

from .base import Baseline, Curve, EvaluationError, Explainer, ExplainerError, Metric, Scores, Subject
from .explainers import EXPLAINERS, make_explainer
from .metrics import DEFAULT_METRICS, METRICS, make_metric
from .report import write_report
from .runner import Setup, run
from .table import results_table
from .training import TrainingLocalisation

__all__ = [
    "DEFAULT_METRICS",
    "EXPLAINERS",
    "METRICS",
    "Baseline",
    "Curve",
    "EvaluationError",
    "Explainer",
    "ExplainerError",
    "Metric",
    "Scores",
    "Setup",
    "Subject",
    "TrainingLocalisation",
    "make_explainer",
    "make_metric",
    "results_table",
    "run",
    "write_report",
]
