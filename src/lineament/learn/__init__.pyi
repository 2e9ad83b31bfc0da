from .tract.layer import tract as tract
from .useful.learning_order import learning_order as learning_order
from .useful.resampling import UpsamplingSampler as UpsamplingSampler
from .useful.resampling import find_slow as find_slow
from .useful.resampling import useful as useful
from .useful.separating import separating_epoch as separating_epoch
from .useful.slow_examples import select_slow as select_slow
