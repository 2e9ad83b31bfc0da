from .costs import matching_cost as matching_cost
from .defences import clip as clip
from .defences import prune as prune
from .defences import soteria as soteria
from .inversion import Stage as Stage
from .inversion import invert as invert
from .labels import inferred_labels as inferred_labels
from .picture_scores import picture_scores as picture_scores
