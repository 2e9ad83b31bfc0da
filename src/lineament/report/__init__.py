"""Figures and pages; knows results, not methods."""
