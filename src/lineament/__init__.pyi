__version__: str

from . import data as data
from . import dictionaries as dictionaries
from . import edit as edit
from . import explain as explain
from . import handcrafted as handcrafted
from . import kernels as kernels
from . import learn as learn
from . import load as load
from . import losses as losses
from . import measure as measure
from . import modules as modules
from . import optim as optim
from . import papers as papers
from . import privacy as privacy
from . import recipes as recipes
from . import train as train
from .audit.compare import compare as compare
from .audit.run import audit as audit
from .core import curvature as curvature
from .core import readouts as readouts
from .core import statistics as statistics
from .core.sites.activations import capture as capture
from .core.sites.activations import patch as patch
from .core.sites.activations import record as record
from .core.sites.hooks import replace as replace
from .core.sites.hooks import tap as tap
from .core.sites.naming import sites as sites

__version__: str
