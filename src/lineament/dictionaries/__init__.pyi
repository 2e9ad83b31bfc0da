from .autoencoders import BatchTopK as BatchTopK
from .autoencoders import Gated as Gated
from .autoencoders import JumpReLU as JumpReLU
from .autoencoders import Neurons as Neurons
from .autoencoders import ReLU as ReLU
from .autoencoders import TopK as TopK
from .selection import Selection as Selection
