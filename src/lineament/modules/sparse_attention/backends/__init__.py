"""Attention over chosen blocks, computed in several ways that agree: a dense mask, gathered keys, and block by block."""
