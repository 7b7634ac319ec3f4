"""The cache policies; importing this package registers all of them."""

from serve.kv.policies.expected_attention import ExpectedAttentionPolicy as ExpectedAttentionPolicy
from serve.kv.policies.full import FullPolicy as FullPolicy
from serve.kv.policies.h2o import H2OPolicy as H2OPolicy
from serve.kv.policies.keydiff import KeyDiffPolicy as KeyDiffPolicy
from serve.kv.policies.knorm import KnormPolicy as KnormPolicy
from serve.kv.policies.random import RandomPolicy as RandomPolicy
from serve.kv.policies.rkv import RKVPolicy as RKVPolicy
from serve.kv.policies.snapkv import SnapKVPolicy as SnapKVPolicy
from serve.kv.policies.tova import TovaPolicy as TovaPolicy
from serve.kv.policies.triattention import TriAttentionPolicy as TriAttentionPolicy
from serve.kv.policies.window import WindowPolicy as WindowPolicy
