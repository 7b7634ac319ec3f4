"""Model definitions: one transformer and one classifier serve training, proofs and serving."""

from common.models.classifier import ClassifierConfig as ClassifierConfig
from common.models.classifier import LipschitzMLP as LipschitzMLP
from common.models.classifier import MLPConfig as MLPConfig
from common.models.config import LayerConfig as LayerConfig
from common.models.config import ModelConfig as ModelConfig
from common.models.transformer import LipschitzTransformer as LipschitzTransformer
