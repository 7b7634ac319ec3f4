"""Our model on the Triton kernels, rotation and cache write fused, under the interpreter."""

PROGRAM = """
import copy
from common.models import LipschitzTransformer, ModelConfig
from serve.decoder import as_decoder
from serve.engine.request import Item, Request, Sequence
from serve.engine.runner import Runner
from serve.engine.sampling_params import SamplingParams

config = ModelConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=(2, 4), context=32,
                     content_heads=(4, 2), position_bias=(True, False), attn_residual=0.5)
model = LipschitzTransformer(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.5)

def run(backend):
    runner = Runner(as_decoder(copy.deepcopy(model)), 8, 4, backend)
    request = Request(request_id="0", prompt=(1, 2, 3, 4, 5), params=SamplingParams(), seed=0,
                      max_total=30)
    sequence, logits = Sequence.start(request), []
    sequence.block_table.extend([5, 2, 6])
    for token, count in ((7, 5), (8, 1), (9, 1)):
        logits.append(runner.forward([Item(sequence=sequence, count=count)]))
        sequence.advance(count)
        sequence.tokens.append(token)
    return torch.cat(logits), runner.rotations

found, rotations = run("triton")
expected, none = run("torch")
assert rotations is not None and none is None
assert gap(found, expected) < 1e-4, gap(found, expected)
"""


def test_fused_steps_equal_torch_under_the_interpreter(interpreted):
    """Oracle: the same steps with torch's operations; prompt chunk, then decodes."""
    interpreted(PROGRAM)
