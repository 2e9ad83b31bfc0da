"""diffGrad: Adam whose every coordinate is slowed down where its gradient stands still (arXiv 1909.11015).

| file | what is in it |
| --- | --- |
| `optimizer.py` | `DiffGrad`: options, state, one step |
| `frictions.py` | the friction in all its versions, and what it was over a network |
| `steps.py` | the arithmetic of a step: by blocks, and by lists of tensors (foreach) |
| `compiled.py` | the same in one pass over memory |
| `foreign_states.py` | state dicts of other libraries' diffGrad, and of Adam |
"""

from lineament.optim.diffgrad.frictions import FrictionSummary, friction
from lineament.optim.diffgrad.optimizer import DiffGrad

__all__ = ["DiffGrad", "FrictionSummary", "friction"]
