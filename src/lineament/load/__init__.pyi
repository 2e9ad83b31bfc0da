from .data import load_data as load_data
from .language_models import load_language_model as load_language_model
from .models import load_model as load_model
from .prompts import load_prompts as load_prompts
from .weights import load_weights as load_weights
