"""Standard problems with known solutions, for tests, benchmarks and the command ``solve``."""

from solvers.library import bilinear as _bilinear
from solvers.library import elastic_net as _elastic_net
from solvers.library import fixed_points as _fixed_points
from solvers.library import games as _games
from solvers.library import group_dro as _group_dro
from solvers.library import least_squares as _least_squares
from solvers.library import linear_program as _linear_program
from solvers.library import quadratic as _quadratic
from solvers.library import shared_multipliers as _shared_multipliers
from solvers.library.known import PROBLEMS as PROBLEMS
from solvers.library.known import KnownProblem as KnownProblem
from solvers.library.known import standard_problem as standard_problem

del _bilinear, _elastic_net, _fixed_points, _games, _group_dro
del _least_squares, _linear_program, _quadratic, _shared_multipliers
