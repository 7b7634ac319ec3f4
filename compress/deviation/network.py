"""By how much a change of MLPs and heads can have moved the output, over all inputs.

Each changed block differs from the dense one by ``delta_l`` at the same input, and a certificate
carries that to the logits: ``e_{l+1} <= rho_l e_l + delta_l``. In form A the errors are those on
the dense network's tokens and the constants those of the changed network, in form B the other way
round. Both constants must hold wherever tokens of either network can lie.
Source: spec modhifi 5.2, bound_tightening 5.
"""

# Legend: K kept inputs, L blocks, M positions.

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.certificate import BlockProof, Certificate
from common.errors import CertificateError
from common.norms import SLACK, TINY, round_up
from compress.deviation.attention import attention_delta
from compress.deviation.mlp import mlp_delta
from compress.deviation.pair import kept_inputs, require_cut
from compress.deviation.recertify import recertify
from solvers.bounds.ellipsoid import Ellipsoid, Tokens
from solvers.bounds.stream_proof import prove_block


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One of the two bounds.

    Attributes:
        name: ``A`` or ``B``.
        deltas: Per block (attention and MLP in turn), l2 bound on the change of its output over
            the tokens of the dense (A) or the changed (B) network.
        radii: Per block, l2 bound on those tokens.
        certificate: Constants of the changed (A) or the dense (B) network, proved wherever tokens
            of either lie; a record of this calculation, not a certificate to store.
        limits: Per block, l2 bound on the distance of the two networks' tokens behind it from
            their own radii alone: what no two such networks exceed.
    """

    name: str
    deltas: tuple[float, ...]
    radii: tuple[float, ...]
    certificate: Certificate
    limits: tuple[float, ...]

    def stream(self, deltas_ML: Tensor) -> Tensor:
        """Bound the l2 movement of the final stream from changes of the blocks, row by row.

        Args:
            deltas_ML: Changes at the same input, residual weight included, float64.
        """
        error_M = deltas_ML.new_zeros(len(deltas_ML))
        blocks = zip(self.certificate.blocks, deltas_ML.T, self.limits, strict=True)
        for block, delta_M, limit in blocks:
            moved_M = (block.tightened * error_M + delta_M) * (1 + SLACK)
            # A small but positive error must not vanish by underflow.
            is_moved_M = (error_M > 0) | (delta_M > 0)
            error_M = torch.where(is_moved_M, moved_M.clamp(min=TINY, max=limit), 0.0)
        return error_M

    def logits(self, deltas_ML: Tensor) -> Tensor:
        """Bound the RMS movement of the logits over the vocabulary; arguments as ``stream``."""
        return self._head * self.stream(deltas_ML) * (1 + SLACK)

    def gains(self) -> tuple[float, ...]:
        """Return per block the RMS movement of the logits per unit of its change (l2)."""
        proof = self.certificate
        return tuple(self._head * proof.amplification(index) for index in range(len(proof.blocks)))

    @property
    def bound(self) -> float:
        """Bound on the RMS movement of the logits over all inputs of the domain."""
        return float(self.logits(self._worst))

    @property
    def stream_bound(self) -> float:
        """Bound on the l2 movement of the final stream over all inputs of the domain."""
        return float(self.stream(self._worst))

    @property
    def limit(self) -> float:
        """What ``bound`` never exceeds, from the tokens' radii alone."""
        return round_up(self._head * self.limits[-1])

    @property
    def _worst(self) -> Tensor:
        return torch.tensor([self.deltas], dtype=torch.float64)

    @property
    def _head(self) -> float:
        return round_up(self.certificate.head_norm / math.sqrt(self.certificate.vocab_size))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """Certified effect of a change: the smaller of the two forms.

    Attributes:
        a: Errors on dense tokens, constants of the changed network.
        b: Errors on the changed network's tokens, dense constants.
    """

    a: Form
    b: Form

    @property
    def forms(self) -> tuple[Form, Form]:
        """Both forms."""
        return (self.a, self.b)

    @property
    def logits(self) -> float:
        """Bound on the RMS change of the logits over the vocabulary, largest over tokens."""
        return min(form.bound for form in self.forms)

    @property
    def stream(self) -> float:
        """Bound on the l2 change of the final stream, largest over tokens."""
        return min(form.stream_bound for form in self.forms)


class _Network(NamedTuple):
    """One of the two networks and its proof."""

    config: Any
    tensors: Mapping[str, Tensor]
    certificate: Certificate

    @classmethod
    def of(cls, model: Any, certificate: Certificate) -> "_Network":
        tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        return cls(model.config, tensors, certificate)

    def prove(self, block: BlockProof, tokens: Tokens) -> tuple[BlockProof, Tokens]:
        """Prove a block again for other tokens; return where they go as well."""
        own = self.certificate.block_multipliers(block.index)
        bound = prove_block(self.config, self.tensors, block.index, tokens, own)
        proof = dataclasses.replace(
            block,
            tightened=bound.tightened,
            naive=bound.naive,
            radius_in=tokens.radius,
            radius_out=bound.radius_out,
            naive_radius_in=tokens.naive_radius,
            naive_radius_out=bound.naive_radius_out,
        )
        return proof, bound.tokens


def certified_deviation(
    dense: Any,
    changed: Any,
    kept: Mapping[str, Tensor] | None,
    certificate: Certificate,
    *,
    changed_certificate: Certificate | None = None,
    max_evals: int = 20,
) -> Deviation:
    """Bound the change of the logits over all inputs of the certificate's domain.

    Args:
        dense: Transformer before the change.
        changed: The same one with fewer MLP neurons or heads, other down projections, or other
            output matrices.
        kept: Kept input indices per target name; all of them where none is named, or for None.
        certificate: Proof of the dense transformer.
        changed_certificate: Proof of the changed one; by default made here without a search.
        max_evals: Budget of eigen-decompositions per changed block; 0 is sound too.

    Returns:
        Both forms. All bounds are 0 when nothing differs.

    Raises:
        CertificateError: if anything else differs, or the two proofs have different domains.
    """
    inputs = kept_inputs(dense, kept or {})
    require_cut(dense, changed, inputs)
    if changed_certificate is None:
        changed_certificate = recertify(dense, changed, inputs, certificate, max_evals=0)
    if certificate.radius != changed_certificate.radius:
        raise CertificateError(
            f"domains of radius {certificate.radius:.6g} and {changed_certificate.radius:.6g}: "
            "expected one; certify both networks again"
        )
    before, after = _Network.of(dense, certificate), _Network.of(changed, changed_certificate)

    def delta(index: int, tokens: Tokens) -> float:
        old, new = dense.layers[index // 2], changed.layers[index // 2]
        kept_K = inputs.get(f"layers.{index // 2}.{('heads', 'mlp')[index % 2]}")
        if kept_K is None:
            return 0.0
        if index % 2:
            return mlp_delta(old.mlp, new.mlp, kept_K, tokens.radius, max_evals=max_evals)
        return attention_delta(old.attention, new.attention, kept_K, tokens, max_evals=max_evals)

    return Deviation(
        a=_form("A", after, before, delta),
        b=_form("B", before, after, delta),
    )


def _form(
    name: str, reference: _Network, other: _Network, delta: Callable[[int, Tokens], float]
) -> Form:
    """Prove the constants of ``reference`` and bound the changes on the tokens of ``other``."""
    both = Tokens.ball(reference.config.width, reference.certificate.radius)
    deltas, radii, blocks, limits = [], [], [], []
    for block, twin in zip(reference.certificate.blocks, other.certificate.blocks, strict=True):
        proof, after = reference.prove(block, both)
        # Its own proof may know better where the other network's tokens lie.
        own = both._replace(radius=min(both.radius, twin.radius_in))
        blocks.append(proof)
        deltas.append(delta(block.index, own))
        radii.append(own.radius)
        limits.append(round_up(block.radius_out + twin.radius_out))
        both = _joined(after, deltas[-1], twin)
    enlarged = dataclasses.replace(reference.certificate, blocks=tuple(blocks))
    return Form(
        name=name,
        deltas=tuple(deltas),
        radii=tuple(radii),
        certificate=enlarged,
        limits=tuple(limits),
    )


def _joined(after: Tokens, delta: float, twin: BlockProof) -> Tokens:
    """Return where tokens of both networks lie after a block that the change moved by ``delta``.

    Args:
        after: Where the reference block takes tokens of both.
        delta: How far from there the other block can take its own.
        twin: The other block's proof, which says where it takes them.
    """
    if delta == 0:
        return after
    radius = max(after.radius, min(round_up(after.radius + delta), twin.radius_out))
    naive = min(round_up(after.naive_radius + delta), twin.naive_radius_out)
    naive = max(radius, after.naive_radius, naive)
    domain = after.domain.plus_ball(delta)
    if domain.radius > radius:
        domain = Ellipsoid.ball(len(domain.factor_CC), radius)
    return Tokens(domain, radius, naive)
