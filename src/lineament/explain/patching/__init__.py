"""Which activations carry a behaviour of a transformer: patching of nodes and edges, and circuits made of them."""
