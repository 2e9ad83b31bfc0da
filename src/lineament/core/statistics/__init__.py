"""One-pass statistics that merge: moments, covariances, cross-covariances, class scatter."""
