"""ModHiFi-U: making a model forget a class, with the recovery guard and honest measurements."""

from compress.unlearning.record import UnlearnReport as UnlearnReport
from compress.unlearning.record import unlearn as unlearn
from compress.unlearning.settings import UnlearnConfig as UnlearnConfig
from compress.unlearning.unlearner import Unlearning as Unlearning
from compress.unlearning.unlearner import unlearn_model as unlearn_model
