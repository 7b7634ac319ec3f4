"""Certified bounds: slopes, block proofs, the trusted checker, network certificates, attacks."""

from solvers.bounds.attack import block_attack as block_attack
from solvers.bounds.attack_settings import AttackSettings as AttackSettings
from solvers.bounds.checker import verify as verify
from solvers.bounds.claims import VerifyReport as VerifyReport
from solvers.bounds.mlp_proof import mlp_bound as mlp_bound
from solvers.bounds.mlp_proof import mlp_form as mlp_form
from solvers.bounds.models import attack as attack
from solvers.bounds.models import certify as certify
from solvers.bounds.models import with_attack as with_attack
from solvers.bounds.network import TightenSettings as TightenSettings
from solvers.bounds.network import naive_bound as naive_bound
