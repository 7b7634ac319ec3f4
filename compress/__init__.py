"""ModHiFi pruning and unlearning under a certificate."""

from compress.pruner import Pruning as Pruning
from compress.pruner import prune_model as prune_model
from compress.record import PruneReport as PruneReport
from compress.record import prune as prune
from compress.settings import CompressConfig as CompressConfig
from compress.unlearning import UnlearnConfig as UnlearnConfig
from compress.unlearning import UnlearnReport as UnlearnReport
from compress.unlearning import unlearn as unlearn
