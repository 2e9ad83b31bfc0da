"""How often is it right, for whom, and does it know when it is not?

Accuracy with Wilson's interval, by class and by group, the worst group; the confusions; calibration by the expected
calibration error over 15 bins (Guo et al. 2017, arXiv 1706.04599). For real-valued targets, R² and the mean absolute error.
"""

from __future__ import annotations

from lineament.audit.correctness.classes import of_classes
from lineament.audit.correctness.labels import of_labels
from lineament.audit.correctness.values import of_values
from lineament.audit.subject import Subject
from lineament.report.section import Section

TITLE = "How often is it right, and for whom?"
HELP = "how often it is right, by class and group, and whether its confidence can be trusted"
ORDER = 10
METHOD = "calibration"
SOURCE = ("On calibration of modern neural networks", 2017, "1706.04599")


def applies(subject: Subject) -> str:
    return ""


def look(subject: Subject) -> Section:
    kinds = {"classification": of_classes, "multi-label": of_labels, "regression": of_values}
    return kinds[subject.task](subject)
