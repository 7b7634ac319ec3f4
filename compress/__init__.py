"""ModHiFi pruning under a certificate."""

from compress.record import PruneReport as PruneReport
from compress.record import prune as prune
from compress.settings import CompressConfig as CompressConfig
