"""Trusted: what a perturbation of the embeddings can do to a network around one token sequence.

Forward, the movement of every token after every block is bounded (never by more than the block's
certified constant times the largest movement before it). Backward, each logit difference is taken
to the inputs exactly, and what the exact gradient misses is paid for at every block.
Source: own derivation, docs/local.md; bound_tightening 5.
"""

# Legend: T token, C width, V vocabulary, M functionals, I last tokens of a prefix, K kinds of size
# (0 per unit of perturbation, 1 rounding of the computed tokens).

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from common.certificate import product_up
from common.models import ModelConfig
from common.norms import SLACK, UNIT, exact64, gamma
from solvers.bounds.ellipsoid import Tokens
from solvers.bounds.local.blocks import AttentionAround, Known, MlpAround, around
from solvers.bounds.stream_proof import prove_block


class Level(NamedTuple):
    """Bounds that hold while every embedding moves by at most ``epsilon``.

    Attributes:
        epsilon: l2 distance.
        sizes: Movement (2, T) of the tokens before each block and after the last.
        known: What is known of each block; None for one that does nothing.
        certified: Product of the certified constants of the blocks up to each, on a ball that
            holds all of this.
    """

    epsilon: float
    sizes: list[Tensor]
    known: list[Known | None]
    certified: list[float]


class Position(NamedTuple):
    """Movement of the differences from the first logit at one token (2, V), and the gaps (V,)."""

    moved_KV: Tensor
    gap_V: Tensor


class Neighbourhood:
    """One token sequence in one network: computed tokens, and bounds around them.

    Args:
        config: The model's configuration.
        tensors: The model's state, any floating types, admissible for a proof.
        multipliers: Of a certificate ("blocks.I.NAME"), or none, and of local MLP bounds
            ("local.I.lambda"), checked.
        ids_T: Token ids, at most the context.
        radius: l2 radius of the ball that the global figures are for, at least.

    Attributes:
        top_T: The first class at each token.
        logits_TV: Computed logits.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        multipliers: Mapping[str, Tensor],
        ids_T: Tensor,
        radius: float,
    ) -> None:
        self.radius = radius
        self._constants = Constants(config, tensors, multipliers)
        self._tokens = [exact64(tensors["embedding.weight"])[ids_T]]
        self._blocks: list[MlpAround | AttentionAround | None] = []
        for index in range(2 * config.layers):
            lambda_N = multipliers.get(f"local.{index}.lambda")
            block = around(config, tensors, index, self._tokens[-1], lambda_N)
            self._blocks.append(block)
            self._tokens.append(self._tokens[-1] if block is None else block.out_TC)
        self._head_VC = config.final_scale * exact64(tensors["head.weight"])[: config.vocab_size]
        self._bias_V = torch.zeros(config.vocab_size, dtype=torch.float64)
        if "head.bias" in tensors:
            self._bias_V = exact64(tensors["head.bias"])[: config.vocab_size]
        self.logits_TV = self._tokens[-1] @ self._head_VC.T + self._bias_V
        self.top_T = self.logits_TV.argmax(-1)

    def level(self, epsilon: float, *, centred: bool) -> Level:
        """Bound all movements while every embedding moves by at most ``epsilon``.

        Args:
            epsilon: l2 distance per token.
            centred: Movements away from the sequence only; else between any two sequences within
                ``epsilon`` of it, which gives Lipschitz constants.
        """
        count = len(self.top_T)
        size_KT = torch.stack((torch.ones(count), torch.zeros(count))).double()
        start = float(self._tokens[0].norm(dim=1).max()) * (1 + SLACK) + epsilon
        ball, outer, factors = start, max(start, self.radius), [1.0]
        sizes, found, certified = [size_KT], list[Known | None](), list[float]()
        for index, block in enumerate(self._blocks):
            known = None
            if block is not None:
                norm_T = self._tokens[index].norm(dim=1) * (1 + SLACK)
                reach_T = (size_KT[0] * epsilon + size_KT[1]) * (1 + SLACK)
                # Computed and true tokens are in the smaller of the two balls that hold them.
                inner = min(float((norm_T + reach_T).max()), max(ball, float(norm_T.max())))
                factor, _, outer = self._constants(index, max(outer, inner))
                constant, path, ball = self._constants(index, inner)
                factors.append(factor)
                known = block.known(reach_T, centred=centred)
                size_KT = known.sizes(size_KT, min(constant, factor), path) * (1 + SLACK)
                size_KT[1] += block.fresh_T
            sizes.append(size_KT)
            found.append(known)
            certified.append(product_up(factors))
        return Level(epsilon, sizes, found, certified)

    def position(self, level: Level, t: int, chosen_M: Tensor | None = None) -> Position:
        """Bound the movement of all differences from the first logit at token t.

        Args:
            level: From ``level``.
            t: Token.
            chosen_M: Classes whose bounds are computed through the gradient, the others by norms;
                all when omitted.
        """
        top, x_C, bias_V = int(self.top_T[t]), self._tokens[-1][t], self._bias_V
        rows_VC = self._head_VC[top] - self._head_VC
        head_V = self._head_VC.norm(dim=1)
        lost_V = 4 * UNIT * (head_V + head_V[top]) * (1 + SLACK)
        gap_V = rows_VC @ x_C + (bias_V[top] - bias_V)
        error_V = gamma(len(x_C) + 16) / UNIT * float(x_C.norm()) * lost_V
        error_V = error_V + 4 * UNIT * (bias_V.abs() + bias_V[top].abs() + gap_V.abs())
        end_K = level.sizes[-1][:, t].clone()
        # Rounding upward must not make the local bound worse than the certified one.
        end_K[0].clamp_(max=level.certified[-1])
        norm_V = rows_VC.norm(dim=1) * (1 + gamma(len(x_C) + 8)) + lost_V
        moved_KV = norm_V * end_K[:, None]
        chosen = torch.arange(len(rows_VC)) if chosen_M is None else chosen_M
        if len(chosen):
            best_KM = self._back(level, t, rows_VC[chosen], moved_KV[:, chosen])
            found_KM = best_KM + lost_V[chosen] * end_K[:, None]
            better_M = _total(level, found_KM) < _total(level, moved_KV[:, chosen])
            moved_KV[:, chosen] = torch.where(better_M, found_KM, moved_KV[:, chosen])
        moved_KV[:, top], gap_V[top], error_V[top] = 0.0, torch.inf, 0.0
        return Position(moved_KV, gap_V - error_V)

    def lipschitz(self, level: Level, t: int) -> float:
        """Bound how fast any difference from the first logit at token t moves."""
        return float(self.position(level, t).moved_KV[0].max())

    def radius_at(self, level: Level, t: int) -> float:
        """Return a distance, at most the level's, within which the first class provably stays.

        For every perturbation strictly inside; 0 where nothing is proved at token t.
        """
        rough = self.position(level, t, self.top_T[:0])
        room_V = rough.gap_V - rough.moved_KV[1]
        loose_V = (room_V <= rough.moved_KV[0] * level.epsilon * (1 + SLACK)).nonzero()[:, 0]
        return _radius(self.position(level, t, loose_V), level.epsilon)

    def global_lipschitz(self, level: Level, t: int) -> float:
        """Return ``lipschitz`` from the certified constants of all blocks alone."""
        return float(self._global(level, t).moved_KV[0].max())

    def global_radius(self, level: Level, t: int) -> float:
        """Return ``radius_at`` from the certified constants of all blocks alone."""
        return _radius(self._global(level, t), level.epsilon)

    def _global(self, level: Level, t: int) -> Position:
        rough = self.position(level, t, self.top_T[:0])
        local = min(float(level.sizes[-1][0, t]), level.certified[-1])
        scale = level.certified[-1] / max(local, 1e-300)
        moved_KV = torch.stack((rough.moved_KV[0] * scale, rough.moved_KV[1]))
        return Position(moved_KV, rough.gap_V)

    def _back(self, level: Level, t: int, rows_MC: Tensor, best_KM: Tensor) -> Tensor:
        """Return the best of the bounds from going back to each block's input."""
        rows_MIC, loose_KM = rows_MC[:, None], torch.zeros_like(best_KM)
        for index in reversed(range(len(self._blocks))):
            block, known = self._blocks[index], level.known[index]
            if block is None or known is None:
                continue
            size_KT = level.sizes[index][:, : t + 1]
            fresh_I = block.fresh_T[t + 1 - rows_MIC.shape[1] : t + 1]
            loose_KM[1] += rows_MIC.norm(dim=-1) @ fresh_I * (1 + 1e-9)
            rows_MIC, missing_KM = known.rows(rows_MIC, size_KT)
            loose_KM = loose_KM + missing_KM
            size_KI = size_KT[:, -rows_MIC.shape[1] :]
            found_KM = size_KI @ rows_MIC.norm(dim=-1).T * (1 + 1e-9) + loose_KM
            better_M = _total(level, found_KM) < _total(level, best_KM)
            best_KM = torch.where(better_M, found_KM, best_KM)
        return best_KM


class Constants:
    """Certified constants of single blocks on balls, proved once each.

    Args:
        config: The model's configuration.
        tensors: The model's state.
        multipliers: Of a certificate, or none.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], multipliers: Mapping[str, Tensor]
    ) -> None:
        self._model = config, tensors
        self._multipliers = multipliers
        self._last = max(
            (i for i in range(config.layers) if config.layer(i).content_heads), default=-1
        )
        self._proved: dict[tuple[int, float], tuple[float, float, float]] = {}

    def __call__(self, index: int, radius: float) -> tuple[float, float, float]:
        """Return a block's constant, value path and the ball after it.

        Behind the last block whose constant depends on the ball, any ball gives the same constant
        and the ball is not tracked (infinite).
        """
        matters = index <= 2 * self._last
        key = (index, radius if matters else 1.0)
        if key not in self._proved:
            prefix, (config, tensors) = f"blocks.{index}.", self._model
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in self._multipliers.items()
                if name.startswith(prefix)
            }
            bound = prove_block(config, tensors, index, Tokens.ball(config.width, key[1]), own)
            path = bound.components.get("tau", torch.inf)
            ball = bound.radius_out if matters else torch.inf
            self._proved[key] = (bound.tightened, path, ball)
        return self._proved[key]


def _radius(position: Position, epsilon: float) -> float:
    room_V = position.gap_V - position.moved_KV[1]
    if not bool((room_V > 0).all()):
        return 0.0
    reached = float((room_V / position.moved_KV[0].clamp(min=1e-300)).min())
    return min(epsilon, reached) * (1 - 1e-9)


def _total(level: Level, moved_KM: Tensor) -> Tensor:
    return moved_KM[0] * level.epsilon + moved_KM[1]
