"""What users bring: models, weights, data and text, and how the two fit together."""
