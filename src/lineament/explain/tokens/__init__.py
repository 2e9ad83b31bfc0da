"""Which tokens of the context made a language model say this word? ReAGent, its rivals, and whether they are true."""

from lineament.explain.tokens.attribution import Script, explain_continuation, rationale, reagent

__all__ = ["Script", "explain_continuation", "rationale", "reagent"]
