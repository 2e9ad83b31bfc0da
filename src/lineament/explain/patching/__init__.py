"""Which activations carry a behaviour of a transformer: patching of nodes and edges, and circuits made of them."""

from lineament.explain.patching.methods import activation_patching, attribution_patching, relevance_patching

__all__ = ["activation_patching", "attribution_patching", "relevance_patching"]
