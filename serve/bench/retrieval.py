"""Exact answers under every policy: does the cache keep what a later question asks for?"""

import statistics
from typing import Any

from common.bundle import Bundle
from common.errors import DataError
from common.tasks import Example, Task
from serve.bench.policies import budget_tokens, compared
from serve.bench.rows import Rows
from serve.bench.settings import BenchConfig
from serve.engine.config import EngineConfig
from serve.engine.sampling_params import SamplingParams
from serve.kv import Policy
from serve.llm import LLM


def measure_tasks(rows: Rows, settings: BenchConfig, bundle: Bundle, task: Task) -> None:
    """Add one row per policy, budget and kind of question.

    With question ``known`` the cache is first compacted after the whole prompt; with ``late``
    already inside it, before the question is read.

    Args:
        rows: Where the rows go.
        settings: Policies, budgets, number of questions.
        bundle: A language model that was trained on the task.
        task: Asks the questions.

    Raises:
        DataError: if the questions do not fit the model's context.
    """
    examples = task.examples(settings.examples)
    longest = max(len(example.prompt) + len(example.answer) + 1 for example in examples)
    if longest > bundle.config.context:
        raise DataError(
            f"task {task.name}: a question of {longest} characters, the model's context is "
            f"{bundle.config.context}; lower the task's length"
        )
    keys: dict[str, Any] = {"task": task.name}
    rows.make("tasks", keys | {"policy": "full"}, lambda: _accuracy(bundle, task, examples, None))
    typical = int(statistics.median(len(example.prompt) for example in examples))
    for query in settings.queries:
        for share in settings.budgets:
            budget = budget_tokens(share, typical)
            late = query == "late"
            for own, policy in compared(settings, bundle, budget, compress_prefill=late):

                def figures(policy: Policy = policy) -> dict[str, Any]:
                    return _accuracy(bundle, task, examples, policy)

                where = {"query": query, "budget": share, "tokens": budget}
                rows.make("tasks", keys | own | where, figures)


def _accuracy(
    bundle: Bundle, task: Task, examples: list[Example], policy: Policy | None
) -> dict[str, float]:
    """Return the means of the task's figures over the greedy answers."""
    llm = LLM(bundle, kv=policy, engine=EngineConfig(certificate=False))
    params = [
        SamplingParams(temperature=0.0, max_tokens=len(example.answer) + 1) for example in examples
    ]
    outputs = llm.generate([example.prompt for example in examples], params, progress=False)
    scores = [task.score(e, output.text) for e, output in zip(examples, outputs, strict=True)]
    kept = statistics.mean(output.kv_kept_fraction for output in outputs)
    figures = {name: statistics.mean(s[name] for s in scores) for name in scores[0]}
    return figures | {"kept_fraction": kept, "examples": float(len(examples))}
