"""One table for all features (arXiv 2305.12102)."""
