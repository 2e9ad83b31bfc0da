"""How a network holds its features."""
