"""Data sets whose features are known, and loaders for users' own data."""
