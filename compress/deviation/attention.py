"""By how much removed or re-weighted heads can move an attention block at the same input.

With ``E_h`` the change of head h's output columns the block moves by
``a * factor * |sum_h E_h V_h z_h|``, every ``z_h`` a mean of tokens under the head's own softmax
weights: a point of any convex set that holds the tokens, whatever those weights are. That is the
value path of purely positional heads, for which ``attention_proof`` has the bound.
Source: spec bound_tightening 4.3 (value path) and 5; own derivation for changed columns.
"""

# Legend: C width, H query heads, X = H * D their joint width, K kept inputs.

import dataclasses
from typing import Any

from torch import Tensor

from common.norms import TINY, exact64, round_up
from solvers.bounds.attention_proof import attention_domain, split_heads, value_path
from solvers.bounds.attention_search import search_attention
from solvers.bounds.ellipsoid import Tokens


def attention_delta(
    dense: Any, changed: Any, kept_K: Tensor, tokens: Tokens, *, max_evals: int = 20
) -> float:
    """Bound ``a |f(X)_t - f~(X)_t|`` over all sequences X of tokens in a set, and all t.

    Args:
        dense: ``Attention`` module before the change.
        changed: After it; kept heads have the same queries, keys, values and position biases
            (checked by the caller), only their output columns may differ.
        kept_K: Kept inputs of the output matrix, in whole heads.
        tokens: Where the tokens lie.
        max_evals: Eigen-decompositions spent on the multipliers; 0 is sound too.

    Returns:
        l2 bound, residual weight and factor included; exactly 0 when nothing changed.
    """
    a, factor = dense.layer.attn_residual, dense.layer.attn_factor
    change_CX = exact64(dense.output.weight).clone()
    # One rounding of every entry; the bounds below are rounded up by far more.
    change_CX[:, kept_K.cpu()] -= exact64(changed.output.weight)
    if a == 0 or factor == 0 or not bool(change_CX.any()):
        return 0.0
    positional = dataclasses.replace(dense.layer, content_heads=0, attn_residual=1.0)
    value_XC = exact64(dense.value.weight)
    heads = split_heads({"value.weight": value_XC, "output.weight": change_CX}, positional)
    seen_CC = tokens.domain.factor_CC
    weights = (None, None, value_XC @ seen_CC, change_CX)
    found = search_attention(weights, positional, seen_CC, max_evals=max_evals)
    # Without skip connection the block is its branch: there is nothing to weigh against it.
    own = {"value": found.growth, "skip": found.growth.new_full((1,), TINY)}
    branch = attention_domain(heads, positional, tokens.domain, own).radius
    gain = factor * min(heads.value_path, value_path(heads, own))
    return round_up(a * min(branch, round_up(gain * tokens.radius)))
