"""Evidence for explanations: explainers behind one protocol, metrics, and an evaluation that can be killed and go on."""

from .base import Baseline, Curve, EvaluationError, Explainer, ExplainerError, Metric, Scores, Subject

__all__ = ["Baseline", "Curve", "EvaluationError", "Explainer", "ExplainerError", "Metric", "Scores", "Subject"]
