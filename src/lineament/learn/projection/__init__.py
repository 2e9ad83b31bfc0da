"""Which layer to export: projection heads, their theory, what each layer is worth (arXiv 2403.11391)."""
