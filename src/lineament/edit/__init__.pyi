from .fidelity import best_subsets as best_subsets
from .fidelity import compensation as compensation
from .fidelity import component_scores as component_scores
from .fidelity import component_similarity as component_similarity
from .fidelity import subset_fidelity as subset_fidelity
