from .density import spectral_density as spectral_density
from .eigenpairs import top_eigenpairs as top_eigenpairs
from .matrices import fisher as fisher
from .matrices import gauss_newton as gauss_newton
from .matrices import hessian as hessian
from .traces import trace as trace
