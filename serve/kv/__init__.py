"""Compression of the KV cache: policies, calibration and the certified deviation they cause."""

from serve.kv.policies import FullPolicy as FullPolicy
from serve.kv.policies import TriAttentionPolicy as TriAttentionPolicy
from serve.kv.policies import WindowPolicy as WindowPolicy
from serve.kv.policy import POLICIES as POLICIES
from serve.kv.policy import Policy as Policy
from serve.kv.policy import policy_by_name as policy_by_name
from serve.kv.selection import choose as choose
from serve.kv.view import CacheView as CacheView
