"""Models whose layers, all or some, attend to the most recent tokens only."""

import pytest
import torch

from serve.hugging_face import HuggingFaceDecoder
from serve.kv import WindowPolicy

WINDOW = 24


@pytest.mark.parametrize("name", ["mistral", "qwen2_mixed"])
@pytest.mark.parametrize("chunk", [512, 16])
def test_sliding_windows_equal_generate(hf, name, chunk):
    """Oracle: ``model.generate``; the texts are longer than the window, prompts in chunks too."""
    model = hf.make_model(name)
    decoder = HuggingFaceDecoder(model)
    windows = [spec.sliding_window for spec in decoder.layers]
    assert windows == ([WINDOW] * 3 if name == "mistral" else [None, WINDOW, WINDOW])
    prompts = hf.make_prompts([9, 50])
    sequences = hf.run(decoder, prompts, max_num_batched_tokens=chunk)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.output == hf.generated(model, prompt, 64)


def test_a_budget_that_holds_the_window_changes_nothing(hf):
    """Oracle: the full cache: no query of a sliding layer sees what eviction takes."""
    decoder = HuggingFaceDecoder(hf.make_model("mistral"))
    prompts = hf.make_prompts([9, 50])
    full = hf.run(decoder, prompts)
    policy = WindowPolicy(budget=WINDOW + 8, interval=8, sinks=0, window=16, protect_prompt=False)
    small = hf.run(decoder, prompts, policy)
    assert [s.output for s in small] == [s.output for s in full]
    assert all(s.kept_fraction < 0.9 for s in small)
    assert len(decoder.groups) == 1
    assert torch.equal(decoder.layers[0].inverse_frequency, decoder.layers[2].inverse_frequency)
