"""Synthetic tasks with exact answers: text to train on, questions to ask, scores of answers.

One file per task; ``task_files`` turns a task into the files of a corpus.
"""

from common.tasks.base import Example, Task
from common.tasks.dfs import DepthFirst
from common.tasks.induction import Induction
from common.tasks.recall import Recall
from common.tasks.text import task_files

TASKS: dict[str, type[Task]] = {task.name: task for task in (Induction, Recall, DepthFirst)}

__all__ = ["TASKS", "DepthFirst", "Example", "Induction", "Recall", "Task", "task_files"]
