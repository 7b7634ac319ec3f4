"""Robustness: what a certificate proves about perturbed inputs, and what attacks find."""

from solvers.robustness.images import ImageEvaluator as ImageEvaluator
from solvers.robustness.radii import PairNorms as PairNorms
from solvers.robustness.radii import certified_radii as certified_radii
from solvers.robustness.record import Evaluation as Evaluation
from solvers.robustness.settings import RobustnessSettings as RobustnessSettings
from solvers.robustness.text import TextEvaluator as TextEvaluator
from solvers.robustness.threat import Threat as Threat
