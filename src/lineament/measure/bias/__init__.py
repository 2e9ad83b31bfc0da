"""Representation bias: which features fill a layer's variance, and what that does to analyses of it."""
