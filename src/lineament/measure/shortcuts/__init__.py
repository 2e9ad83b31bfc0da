"""Shortcuts: does a network decide by the attribute that is easy to extract, or by the one that predicts best?"""
