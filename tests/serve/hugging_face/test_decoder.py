"""Models of ``transformers`` in the engine, against their own forward pass and ``generate``."""

import pytest
import torch

from serve.engine.request import Item, Request, SamplingParams, Sequence
from serve.engine.runner import Runner
from serve.hugging_face import HuggingFaceDecoder

CLOSE = 1e-4  # float32 logits of size ten, other matrix shapes
FULL = ("llama", "llama3", "yarn", "qwen2", "qwen3", "phi3", "glm", "cohere", "smollm3")


def sequence_of(tokens):
    """A request with a whole text as its prompt."""
    request = Request(
        request_id="text",
        prompt=tuple(tokens),
        params=SamplingParams(),
        seed=0,
        max_total=len(tokens) + 1,
    )
    return Sequence.start(request)


@pytest.mark.parametrize("name", FULL)
def test_engine_logits_equal_the_models_own_forward(hf, name):
    """Oracle: the model's forward over the text at once, with the library's own attention."""
    model = hf.make_model(name)
    tokens = hf.make_prompts([40])[0]
    expected = model(torch.tensor([tokens])).logits[0]
    sequence = sequence_of(tokens)
    runner = Runner(HuggingFaceDecoder(model), num_blocks=8, block_size=16)
    sequence.block_table = [3, 1, 2]
    rows = []
    for count in (17, 1, 1, 20, 1):
        logits = runner.forward([Item(sequence=sequence, count=count)])
        sequence.advance(count)
        rows.append((sequence.num_tokens - 1, logits[0]))
    for position, logits in rows:
        assert float((logits - expected[position]).abs().max()) < CLOSE


@pytest.mark.parametrize("name", FULL)
def test_greedy_tokens_equal_generate(hf, name):
    """Oracle: ``model.generate`` on the same object, before and after; 64 new tokens."""
    model = hf.make_model(name)
    prompts = hf.make_prompts([9, 33])
    expected = [hf.generated(model, prompt, 64) for prompt in prompts]
    sequences = hf.run(HuggingFaceDecoder(model), prompts)
    assert [sequence.output for sequence in sequences] == expected
    assert hf.generated(model, prompts[0], 4) == expected[0][:4]
