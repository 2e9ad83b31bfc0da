"""Layer-wise relevance propagation on a model as it is."""

from lineament.explain.relevance.context import PRESETS, RULES, Coverage, Rules, assigned, relevance_rules

__all__ = ["PRESETS", "RULES", "Coverage", "Rules", "assigned", "relevance_rules"]
