"""Sparse and full attention, aligned (arXiv 2511.20102): functions, Hugging Face models, decoding and training."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
