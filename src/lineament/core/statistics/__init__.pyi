from .class_scatter import ClassScatter as ClassScatter
from .moments import Covariance as Covariance
from .moments import CrossCovariance as CrossCovariance
from .moments import Moments as Moments
