"""Which activations carry a behaviour of a transformer: patching of nodes and edges, and circuits made of them."""

from lineament.explain.patching.first_order import attribution_patching, relevance_patching
from lineament.explain.patching.measured import activation_patching

__all__ = ["activation_patching", "attribution_patching", "relevance_patching"]
