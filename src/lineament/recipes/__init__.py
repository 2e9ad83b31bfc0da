"""One package per paper: a frozen ``Config`` with presets, and ``run(config, *, out) -> Outcome``; what they share is in ``kit/``.

A recipe is found by its folder, so adding one needs no list to be edited. Only the recipe that is asked for is imported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
