"""Layer-wise relevance propagation on a model as it is."""
