"""How training shapes features: what a network is trained against, and how.

Three loops, since each keeps another promise. ``fit.py`` trains a user's classifier whole, on one process or several, and reseeds by epoch, so
that a killed run needs no generator's state. ``epochs.py`` is what USEFUL's stages walk epoch by epoch, with MixUp, augmentation and weights drawn
from one generator that its checkpoint holds. Both take the step of ``steps.py``. ``training.py`` is a training as a value, which stacks dozens of
networks into one program.
"""
