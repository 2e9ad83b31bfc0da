"""Colour for grey video: ColorMNet (Yang, Dong, Tang and Pan 2024, arXiv 2404.06251)."""
