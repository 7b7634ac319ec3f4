"""Certificates around one token sequence: radii and Lipschitz bounds below the global ones."""

from solvers.bounds.local.checker import LocalReport as LocalReport
from solvers.bounds.local.checker import verify_local as verify_local
from solvers.bounds.local.record import LocalBlock as LocalBlock
from solvers.bounds.local.record import LocalCertificate as LocalCertificate
from solvers.bounds.local.search import SearchSettings as SearchSettings
from solvers.bounds.local.search import certify_local as certify_local
