"""The main job: lenses over one model, one report. :func:`audit` is the command ``lineament audit`` as a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lineament.audit.run import AuditOptions, Report, audit

__all__ = ["AuditOptions", "Report", "audit"]


def __getattr__(name: str) -> Any:
    # Late, so that the command line can list the lenses without importing torch.
    if name in __all__:
        from lineament.audit import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
