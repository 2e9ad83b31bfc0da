"""USEFUL: find the examples that are learned late and show them twice (arXiv 2404.17768)."""
