"""What policies with evidence of their own collect while sequences run."""

from serve.kv.observers.attention_mass import AttentionMass as AttentionMass
from serve.kv.observers.query_moments import QueryMoments as QueryMoments
from serve.kv.observers.query_window import QueryWindow as QueryWindow
