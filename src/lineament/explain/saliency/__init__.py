"""Where does a network look? Maps of any method at any site, what they are weighed and compared with, and checks of them."""

from lineament.explain.saliency.baselines import (
    centre_map,
    class_activation,
    integrated_gradients,
    random_map,
)
from lineament.explain.saliency.checks import class_sensitivity, randomisation
from lineament.explain.saliency.layer_weights import layer_weights
from lineament.explain.saliency.maps import combined_saliency, normgrad, saliency
from lineament.explain.saliency.meta import meta_saliency
from lineament.explain.saliency.methods import METHODS, Method

__all__ = [
    "METHODS",
    "Method",
    "centre_map",
    "class_activation",
    "class_sensitivity",
    "combined_saliency",
    "integrated_gradients",
    "layer_weights",
    "meta_saliency",
    "normgrad",
    "random_map",
    "randomisation",
    "saliency",
]
