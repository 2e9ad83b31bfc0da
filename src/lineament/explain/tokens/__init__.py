"""Which tokens of the context made a language model say this word? ReAGent, its rivals, and whether they are true."""

from lineament.explain.tokens.attribution import Script, rationale, reagent
from lineament.explain.tokens.continuation import explain_continuation

__all__ = ["Script", "explain_continuation", "rationale", "reagent"]
