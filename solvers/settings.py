"""Settings of the commands ``certify`` and ``attack``."""

import dataclasses

from common.config import check_types, positive
from solvers.bounds.attack_settings import AttackSettings
from solvers.bounds.network import TightenSettings


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CertifySettings:
    """What the configuration group ``certify`` says; see ``TightenSettings``, ``AttackSettings``.

    Attributes:
        tighten: Search multipliers; false leaves the bounds from operator norms.
        method: Solver of the multiplier search.
        tol: Wanted duality gap relative to the first value of each search.
        max_evals: Eigen-decompositions per search.
        stream_steps: Steps of the joint search over all blocks; None for the default of
            ``TightenSettings``.
        warm: Bundle whose certificate's multipliers start the search (the one that this one was
            pruned or fine-tuned from), or None.
        attack_steps: Adam steps on each block; 0 switches all attacks off.
        attack_network_steps: Adam steps on the whole network.
        attack_starts: Sequences attacked at once.
        attack_tokens: Length of the attacked sequences, tokens.
        attack_rate: Adam step per token, relative to the radius.
    """

    tighten: bool = True
    method: str = "halpern_anderson"
    tol: float = 0.01
    max_evals: int = 200
    stream_steps: int | None = None
    warm: str | None = None
    attack_steps: int = 40
    attack_network_steps: int = 16
    attack_starts: int = 4
    attack_tokens: int = 16
    attack_rate: float = 0.3

    def __post_init__(self) -> None:
        check_types(self)
        self.tightening()
        # Their message would name the key of another command.
        for name in ("steps", "network_steps"):
            positive(f"certify.attack_{name}", getattr(self, f"attack_{name}"), zero=True)
        for name in ("starts", "tokens", "rate"):
            positive(f"certify.attack_{name}", getattr(self, f"attack_{name}"))

    def tightening(self) -> TightenSettings:
        """Return the settings of the multiplier search."""
        return TightenSettings(
            method=self.method,
            tol=self.tol,
            max_evals=self.max_evals,
            stream_steps=self.stream_steps,
        )

    def attacks(self, seed: int) -> AttackSettings:
        """Return the settings of the attacks."""
        return AttackSettings(
            steps=self.attack_steps,
            network_steps=self.attack_network_steps,
            restarts=self.attack_starts,
            tokens=self.attack_tokens,
            rate=self.attack_rate,
            seed=seed,
        )
