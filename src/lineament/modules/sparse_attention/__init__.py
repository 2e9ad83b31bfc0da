"""Sparse and full attention, aligned (arXiv 2511.20102)."""
