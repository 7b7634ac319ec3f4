"""All tasks alike: repeatable, strictly scored, and a corpus that is generated once."""

from dataclasses import asdict

import pytest
from hydra import compose, initialize_config_module

from common.config import build
from common.corpus import DataConfig, prepare_corpus
from common.errors import ConfigError, DataError
from common.tasks import TASKS, DepthFirst, Recall, task_files

SIZE = 20000


@pytest.mark.parametrize("name", sorted(TASKS))
def test_examples_are_functions_of_seed_and_number(name: str) -> None:
    """Oracle: a second task object; other seeds, other numbers and the other stream differ."""
    task, again, other = (TASKS[name](seed=seed) for seed in (3, 3, 4))
    backwards = [again.example(i) for i in reversed(range(20))][::-1]
    assert task.examples(20) == backwards
    assert [task.document(i) for i in range(20)] == [again.document(i) for i in range(20)]
    assert task.examples(20) != other.examples(20)
    assert len({example.prompt for example in task.examples(20)}) == 20
    streams = [task.generator(stream, 7).random() for stream in ("document", "example")]
    assert streams[0] != streams[1]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_right_answers_alone_are_exact(name: str) -> None:
    """Oracle: the answer scores 1 everywhere; each change of one character loses ``exact``."""
    task = TASKS[name]()
    for example in task.examples(30):
        assert set(task.score(example, example.answer + task.end + "rest").values()) == {1.0}
        assert task.end not in example.answer
        for place in range(len(example.answer)):
            wrong = example.answer[:place] + "!" + example.answer[place + 1 :]
            figures = task.score(example, wrong)
            assert figures["exact"] == 0
            assert all(0 <= figure <= 1 for figure in figures.values())


@pytest.mark.parametrize("name", sorted(TASKS))
def test_corpus_is_the_documents_of_the_task(name, tmp_path):
    """Oracle: the documents themselves, joined, up to the wanted size."""
    task = TASKS[name](seed=2)
    config = DataConfig(
        source="task", task=task, max_bytes=SIZE, tokenizer="char", cache=str(tmp_path)
    )
    corpus = prepare_corpus(config)
    ids = [*corpus.tokens("train"), *corpus.tokens("val")]
    text = corpus.tokenizer.decode(ids)
    documents = "".join(task.document(index) for index in range(SIZE // 20))
    assert text == documents[:SIZE]
    for example in task.examples(20):
        corpus.tokenizer.encode(example.prompt + example.answer + task.end)


def test_text_is_written_once_per_settings(tmp_path):
    """Oracle: the file's modification time; each other setting has another file."""
    first = task_files(Recall(), SIZE, tmp_path).paths[0]
    written = first.stat().st_mtime_ns
    assert task_files(Recall(), SIZE, tmp_path).paths[0] == first
    assert first.stat().st_mtime_ns == written
    others = [(Recall(seed=1), SIZE), (Recall(needles=7), SIZE), (Recall(), 2 * SIZE)]
    found = {task_files(task, size, tmp_path).paths[0] for task, size in others}
    assert len(found | {first}) == 4
    assert SIZE <= first.stat().st_size < SIZE + 400
    assert first.read_text().endswith("\n")


def test_unwritable_cache_is_named(tmp_path):
    """Oracle: a file stands where the folder should be."""
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="cannot write the text of task dfs"):
        task_files(DepthFirst(), SIZE, tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "task"}, "data.task=None: data.source=task"),
        ({"source": "stdlib", "task": Recall()}, "data.source=stdlib, expected a task"),
        ({"source": "task", "task": Recall()}, "data.max_bytes=null"),
        ({"source": "task", "task": "recall"}, "data.task='recall'|DataConfig.task='recall'"),
    ],
)
def test_task_and_source_go_together(settings, message):
    """Oracle: the message names the setting."""
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_configuration_holds_the_defaults(name):
    """Oracle: the class; a file that lists every field with its default."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("train", overrides=[f"data={name}"])
    assert build(config.data).task == TASKS[name]()
    assert set(config.data.task) == {"_target_", *asdict(TASKS[name]())}
