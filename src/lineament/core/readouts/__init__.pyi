from .logistic_readout import logistic as logistic
from .ridge_readout import ridge as ridge
