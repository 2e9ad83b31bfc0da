"""A few learned pictures in place of a data set (arXiv 2202.02916)."""
