from .kit.configuration import available as available
from .kit.configuration import configure as configure
from .kit.configuration import load as load
from .kit.run import reproduce as reproduce
