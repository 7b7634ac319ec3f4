"""Exact answers under every policy: does the cache keep what a later question asks for?"""

import statistics
from typing import Any

from common.errors import DataError
from common.tasks import Example, Task
from serve.bench.policies import budget_tokens, compared, statistics_of
from serve.bench.rows import Rows
from serve.bench.settings import BenchConfig
from serve.decoder import as_decoder
from serve.engine.config import EngineConfig
from serve.engine.sampling_params import SamplingParams
from serve.kv import Policy
from serve.llm import LLM, require_tokenizer
from serve.loading import Served


def measure_tasks(rows: Rows, settings: BenchConfig, served: Served, task: Task) -> None:
    """Add one row per policy, budget and kind of question.

    With question ``known`` the cache is first compacted after the whole prompt, whose last token
    therefore still sees all of it; with ``late`` already inside it, before the question is read.

    Args:
        rows: Where the rows go.
        settings: Policies, budgets, number of questions.
        served: A language model that was trained on the task.
        task: Asks the questions.

    Raises:
        DataError: if the model's tokenizer cannot write the questions, or its context is too
            short for them.
    """
    examples = task.examples(settings.examples)
    typical = int(statistics.median(_lengths(served, task, examples)))
    keys: dict[str, Any] = {"task": task.name}
    rows.make("tasks", keys | {"policy": "full"}, lambda: _accuracy(served, task, examples, None))
    for query in settings.queries:
        for share in settings.budgets:
            budget = budget_tokens(share, typical)
            late = query == "late"
            for own, policy in compared(settings, budget, compress_prefill=late):

                def figures(policy: Policy = policy) -> dict[str, Any]:
                    return _accuracy(served, task, examples, policy)

                where = {"query": query, "budget": share, "tokens": budget}
                rows.make("tasks", keys | own | where, figures, statistics_of(served, policy))


def _lengths(served: Served, task: Task, examples: list[Example]) -> list[int]:
    """Return the tokens of each prompt, when the model can read and answer all of them."""
    tokenizer, context = require_tokenizer(served), as_decoder(served.model).context
    lengths = []
    for example in examples:
        text = example.prompt + example.answer + task.end
        # Tokenizers of sentences may drop or add a first space.
        if tokenizer.decode(tokenizer.encode(text).tolist()).lstrip(" ") != text.lstrip(" "):
            raise DataError(
                f"task {task.name}: the tokenizer of {served.path} does not give its text back; "
                "leave out bench.parts=tasks, or choose a model that knows these characters"
            )
        lengths.append(len(tokenizer.encode(example.prompt)))
        longest = lengths[-1] + _answer_tokens(example)
        if longest > context:
            raise DataError(
                f"task {task.name}: a question of {longest} tokens, the model's context is "
                f"{context}; lower data.task.length"
            )
    return lengths


def _answer_tokens(example: Example) -> int:
    """Return the most tokens that an answer and its end can have."""
    return len(example.answer) + 1


def _accuracy(
    served: Served, task: Task, examples: list[Example], policy: Policy | None
) -> dict[str, float]:
    """Return the means of the task's figures over the greedy answers."""
    llm = LLM(served, kv=policy, engine=EngineConfig(certificate=False))
    params = [
        SamplingParams(temperature=0.0, max_tokens=_answer_tokens(example)) for example in examples
    ]
    outputs = llm.generate([example.prompt for example in examples], params, progress=False)
    for output in outputs:
        if output.error is not None:
            raise DataError(f"task {task.name}: a question ended with an error: {output.error}")
    scores = [task.score(e, output.text) for e, output in zip(examples, outputs, strict=True)]
    kept = statistics.mean(output.kv_kept_fraction for output in outputs)
    figures = {name: statistics.mean(s[name] for s in scores) for name in scores[0]}
    return figures | {"kept_fraction": kept, "examples": float(len(examples))}
