"""Evidence for explanations: explainers and metrics behind two small protocols, and a run of them that can go on."""

from .base import Baseline, Curve, EvaluationError, Explainer, ExplainerError, Metric, Scores, Subject

__all__ = ["Baseline", "Curve", "EvaluationError", "Explainer", "ExplainerError", "Metric", "Scores", "Subject"]
