"""One file per paper: its headline claim, run and judged. See ``docs/architecture.md``, "A recipe"."""
