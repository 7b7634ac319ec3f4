"""Proofs of the paper's 2M model: naive, tightened, re-proved, attacked."""

from collections.abc import Callable
from typing import Any

from solvers.bounds import AttackSettings, attack, certify, verify

NAIVE, TIGHTENED, VERIFY = 1.0, 60.0, 10.0
GROSS = 10  # times its budget: a search that no longer converges


def test_certificate(bench: Any, timed: Callable, make_model: Callable) -> None:
    """Seconds of each stage; the tightened search runs once, it is deterministic."""
    model = make_model()
    sizes = {"parameters": model.num_parameters}
    found: list[Any] = []
    once = {"tightened": lambda: found.append(certify(model))}
    once["attack"] = lambda: attack(model, found[0], settings=AttackSettings())
    for name, times in timed(once, 1, warmup=0).items():
        budget = {"most": TIGHTENED} if name == "tightened" else {}
        bench.add(f"certify: {name}", times.cpu, "s", **budget, **sizes)
        assert sum(times.cpu) <= GROSS * TIGHTENED
    often = {
        "naive": lambda: certify(model, tighten=False),
        "verify": lambda: verify(model, found[0]),
    }
    budgets = {"naive": NAIVE, "verify": VERIFY}
    for name, times in timed(often, bench.rounds).items():
        bench.add(f"certify: {name}", times.cpu, "s", most=budgets[name], **sizes)
        assert sum(times.cpu) / bench.rounds <= GROSS * budgets[name]
