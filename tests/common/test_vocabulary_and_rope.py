"""Two options of large models: a padded head and partly rotated heads."""

import pytest
import torch

from common.bundle import load_bundle, save_bundle
from common.certificate import config_sha256
from common.errors import ConfigError
from common.models import LipschitzTransformer, ModelConfig
from common.models.rope import inverse_frequencies, rotate, rotation
from common.tokenizer import CharTokenizer
from solvers.bounds import certify, verify

# Letters: V vocabulary, D head width, F bands.

# The same products in another order: a few units in the last place of float64.
ROUNDING = 1e-12


def make_config(**changes):
    """Return a small configuration of 50 tokens."""
    shape = {"vocab_size": 50, "width": 16, "layers": 2, "heads": 2, "context": 12}
    return ModelConfig(**(shape | changes))


def make_pair(head_bias=False):
    """Return a model without and one with a padded head, equal in all that counts."""
    torch.manual_seed(0)
    plain = LipschitzTransformer(make_config(head_bias=head_bias)).double()
    padded = LipschitzTransformer(make_config(head_bias=head_bias, vocab_multiple=64)).double()
    state = plain.state_dict()
    for name in [name for name in state if name.startswith("head")]:
        surplus = torch.randn(14, *state[name].shape[1:], dtype=torch.float64)
        state[name] = torch.cat((state[name], 0.1 * surplus))
    padded.load_state_dict(state)
    return plain, padded


@pytest.mark.parametrize("head_bias", [False, True])
def test_surplus_rows_take_no_part(head_bias):
    """Oracle: the model without them; their gradient is exactly zero."""
    plain, padded = make_pair(head_bias)
    tokens = torch.randint(50, (3, 12))
    assert padded.head.weight.shape == (64, 16)
    assert padded(tokens).shape == (3, 12, 50)
    assert torch.allclose(padded(tokens), plain(tokens), rtol=ROUNDING, atol=ROUNDING)
    padded(tokens).square().sum().backward()
    assert padded.head.weight.grad[:50].abs().max() > 0
    assert padded.head.weight.grad[50:].abs().max() == 0


def test_certificate_counts_true_tokens_and_every_stored_row(tmp_path):
    """Oracle: the factor sqrt(C / V) has V = 50, and the surplus rows can only raise the norm."""
    plain, padded = make_pair()
    tokenizer = CharTokenizer("".join(map(chr, range(40, 90))))
    certificate = certify(padded, tighten=False)
    without = certify(plain, tighten=False)
    assert certificate.vocab_size == without.vocab_size == 50
    assert certificate.naive >= without.naive
    save_bundle(tmp_path / "b", padded, tokenizer, certificate=certificate)
    assert verify(tmp_path / "b").naive == pytest.approx(certificate.naive, rel=1e-6)
    assert load_bundle(tmp_path / "b").config.head_rows == 64
    with torch.no_grad():
        padded.head.weight[50:] = 0
    cleared = certify(padded, tighten=False)
    assert cleared.naive == pytest.approx(without.naive, rel=1e-9)


def test_nanogpt_sizes():
    """Oracle: the released script's 50,257 tokens become 50,304 head rows and 162.2M weights."""
    config = ModelConfig(
        vocab_size=50257, width=768, layers=12, heads=6, context=1024, vocab_multiple=128
    )
    with torch.device("meta"):
        model = LipschitzTransformer(config)
    assert config.head_rows == 50304
    assert config.layer(0).head_dim == 128
    assert model.num_parameters == (50257 + 50304) * 768 + 12 * (4 * 768**2 + 8 * 768**2)


def test_half_truncated_frequencies():
    """Oracle: the released script's (1/1024)^linspace(0, 1, D/4), then zeros."""
    expected_F = (1 / 1024) ** torch.linspace(0, 1, 32, dtype=torch.float64)
    found_F = inverse_frequencies(128, 1024 ** (32 / 31), 64)
    assert torch.allclose(found_F[:32], expected_F, rtol=ROUNDING, atol=0)
    assert found_F[32:].abs().max() == 0
    assert torch.equal(inverse_frequencies(8, 100.0, 8), inverse_frequencies(8, 100.0))
    assert inverse_frequencies(8, 100.0, 0).abs().max() == 0


def test_components_beyond_rope_dims_stand_still():
    """Oracle: identity on the bands without frequency, a rotation of equal norm on the others."""
    x_BHTD = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    cos_sin = rotation(torch.arange(5)[None], inverse_frequencies(8, 100.0, 4), torch.float64)
    turned = rotate(x_BHTD, cos_sin)
    still = [2, 3, 6, 7]
    moved = [0, 1, 4, 5]
    assert torch.equal(turned[..., still], x_BHTD[..., still])
    assert not torch.allclose(turned[..., 1:, moved], x_BHTD[..., 1:, moved])
    assert torch.allclose(turned.norm(dim=-1), x_BHTD.norm(dim=-1), rtol=ROUNDING)


def test_hashes_of_models_without_the_options_are_unchanged():
    """Oracle: the fields of release 0.1; with an option the hash differs and round trips."""
    plain = make_config()
    assert not {"rope_dims", "vocab_multiple"} & set(plain.to_dict())
    for changes in ({"rope_dims": 4}, {"vocab_multiple": 64}):
        config = make_config(**changes)
        assert ModelConfig.from_dict(config.to_dict()) == config
        assert config_sha256(config) != config_sha256(plain)


@pytest.mark.parametrize(
    "changes", [{"rope_dims": 3}, {"rope_dims": 10}, {"rope_dims": -2}, {"vocab_multiple": 0}]
)
def test_impossible_options_are_named(changes):
    """Oracle: the field's name is in the message."""
    with pytest.raises(ConfigError, match=next(iter(changes))):
        make_config(**changes)
