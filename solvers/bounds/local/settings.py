"""Settings of local certificates on the command line."""

import dataclasses

from common.config import check_types, one_of
from common.errors import ConfigError
from solvers.bounds.local.search import SearchSettings


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AroundSettings:
    """What the key ``around`` of ``lipllm certify`` says; see ``SearchSettings`` for the search.

    Attributes:
        text: One prompt.
        prompts: Several prompts, after ``text``; neither means no local certificate.
        radius: Distance (l2 per embedding) to prove, or ``auto`` for the largest provable ones.
        levels: Distances tried where the radius is ``auto``.
        cells: Tokens that the shared multipliers of each MLP are optimised for.
        method: Solver of the shared multipliers.
        tol: Wanted duality gap relative to the first value.
        max_evals: Eigen-decompositions of all cells, per MLP.
    """

    text: str | None = None
    prompts: tuple[str, ...] = ()
    radius: float | str = "auto"
    levels: int = 16
    cells: int = 4
    method: str = "halpern_anderson"
    tol: float = 0.01
    max_evals: int = 12

    def __post_init__(self) -> None:
        check_types(self, prefix="around.")
        if isinstance(self.radius, str):
            one_of("around.radius", self.radius, ("auto",))
        try:
            self.search()
        except ConfigError as error:
            raise ConfigError(f"around.{str(error).removeprefix('SearchSettings.')}") from error

    @property
    def texts(self) -> tuple[str, ...]:
        """All prompts."""
        return ((self.text,) if self.text is not None else ()) + self.prompts

    def search(self) -> SearchSettings:
        """Return the settings of the search."""
        return SearchSettings(
            radius=None if isinstance(self.radius, str) else float(self.radius),
            levels=self.levels,
            cells=self.cells,
            method=self.method,
            tol=self.tol,
            max_evals=self.max_evals,
        )
