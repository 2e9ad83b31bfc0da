"""Graphs whose second derivatives are cheap."""
