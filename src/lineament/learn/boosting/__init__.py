"""Networks grown by gradient boosting (arXiv 1909.12098)."""
