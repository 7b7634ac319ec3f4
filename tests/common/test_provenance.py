"""Provenance: complete, and free of machine paths."""

import pytest

from common.corpus import DataConfig, prepare_corpus
from common.provenance import describe_training, portable, portable_command


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("data.path=/srv/texts/input.txt", "data.path=input.txt"),
        ("data.path=~/input.txt", "data.path=input.txt"),
        ("data.path=../input.txt", "data.path=input.txt"),
        ("data.path=C:\\texts\\input.txt", "data.path=input.txt"),
        ("/srv/x/y", "y"),
        ("hydra.run.dir=/", "hydra.run.dir=."),
        ("trainer.max_steps=10", "trainer.max_steps=10"),
        ("data.name=owner/name", "data.name=owner/name"),
        ("optim.betas=[0.9,0.95]", "optim.betas=[0.9,0.95]"),
        ("-m", "-m"),
    ],
)
def test_paths_are_cut(argument, expected):
    """Oracle: the table."""
    assert portable(argument) == expected


def test_command_is_whole():
    """Oracle: every argument in order."""
    assert (
        portable_command("train", ["seed=1", "data.path=/a/b"]) == "lipllm train seed=1 data.path=b"
    )


def test_training_is_described_without_places(text_file):
    """Oracle: the corpus' own figures; no folder of this machine in any value."""
    corpus = prepare_corpus(DataConfig(source="local", path=str(text_file)))
    found = describe_training(command="lipllm train", seed=7, corpus=corpus, facts={"steps": 3})
    assert (found["seed"], found["steps"]) == (7, 3)
    assert found["corpus"]["text_sha256"] == corpus.sha256
    assert found["corpus"]["name"] == text_file.name
    assert found["corpus"]["train_tokens"] == corpus.num_tokens("train")
    assert "torch" in found["versions"]
    assert str(text_file.parent) not in str(found)
