"""Monotone inclusions, and the sound Lipschitz bounds built on them."""

from solvers import anderson as _anderson
from solvers import extragradient as _extragradient
from solvers import forb as _forb
from solvers import halpern as _halpern
from solvers import inexact_halpern as _inexact_halpern
from solvers import lbfgs as _lbfgs
from solvers import pdhg as _pdhg
from solvers import resolvent_halpern as _resolvent_halpern
from solvers import vr_extragradient as _vr_extragradient
from solvers import vr_halpern as _vr_halpern
from solvers.bilinear import bilinear_sum as bilinear_sum
from solvers.finite_sum import FiniteSumInclusion as FiniteSumInclusion
from solvers.games import matrix_game as matrix_game
from solvers.iterate import SOLVERS as SOLVERS
from solvers.iterate import Solver as Solver
from solvers.iterate import continuation as continuation
from solvers.iterate import iterate as iterate
from solvers.iterate import make_solver as make_solver
from solvers.iterate import solve as solve
from solvers.library import standard_problem as standard_problem
from solvers.linear_program import linear_program as linear_program
from solvers.linear_program import solve_linear_program as solve_linear_program
from solvers.oracle import Oracle as Oracle
from solvers.problem import Inclusion as Inclusion
from solvers.problem import fixed_point as fixed_point
from solvers.saddle import BilinearSaddle as BilinearSaddle
from solvers.saddle import bilinear_saddle as bilinear_saddle
from solvers.scaling import center as center
from solvers.solution import Result as Result
from solvers.solution import Status as Status
from solvers.solution import TracePoint as TracePoint

del _anderson, _extragradient, _forb, _halpern, _inexact_halpern, _lbfgs, _resolvent_halpern
del _pdhg, _vr_extragradient, _vr_halpern
