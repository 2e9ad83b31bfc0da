"""One file per lens."""
