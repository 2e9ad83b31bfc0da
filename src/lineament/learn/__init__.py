"""How training shapes features: what a network is trained against, and how."""
