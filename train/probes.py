"""Looks at a model while it trains: certificate, norms, activations, text. Nothing here trains."""

# Legend: B batch, T token position, C width, V vocabulary, O/I out/in features.

import torch
from torch import Tensor

from common.certificate import Certificate
from common.models import LipschitzTransformer
from common.norms import spectral_norm
from solvers.bounds import certify
from train.groups import role


def naive_certificate(model: LipschitzTransformer) -> Certificate:
    """Return the certificate without tightening; cheap enough to follow a training run."""
    return certify(model, tighten=False)


def certificate_figures(certificate: Certificate) -> dict[str, float]:
    """Return the totals of a certificate under their declared metric names."""
    names = ("reference", "naive", *(("tightened",) if certificate.multipliers else ()))
    totals = {f"cert/{name}": float(getattr(certificate, name)) for name in names}
    return totals | {f"cert/log10_{n}": float(getattr(certificate, f"log10_{n}")) for n in names}


@torch.no_grad()
def matrix_norms(model: LipschitzTransformer) -> dict[str, float]:
    """Return ``train/norm/<matrix>``: RMS->RMS norms, for the embedding the largest row RMS."""
    norms = {}
    for name, w_OI in model.named_parameters():
        kind, short = role(name), name.removesuffix(".weight")
        if kind == "embedding":
            norms[f"train/norm/{short}"] = float(w_OI.square().mean(dim=1).sqrt().max())
        elif kind != "vector":
            scale = (w_OI.shape[1] / w_OI.shape[0]) ** 0.5
            norms[f"train/norm/{short}"] = scale * spectral_norm(w_OI)
    return norms


@torch.no_grad()
def activation_maxima(model: LipschitzTransformer, tokens_BT: Tensor) -> dict[str, float]:
    """Return ``train/act_max/<place>``: the largest absolute entry of the stream and the logits.

    Places are ``embedding``, each layer's ``attention`` and ``mlp`` block (the stream behind it)
    and ``logits``. Estimates: the largest on these tokens. Compare with a run under
    ``constraint=none`` to see what the caps do to the range that low precision has to cover.
    """
    x_BTC = model.embed(tokens_BT.to(model.embedding.weight.device))
    maxima = {"train/act_max/embedding": float(x_BTC.abs().max())}
    for index, layer in enumerate(model.layers):
        for kind, block in (("attention", layer.attend_block), ("mlp", layer.mlp_block)):
            x_BTC = block(x_BTC)
            place = f"{index}.{kind}"
            maxima[f"train/act_max/{place}"] = float(x_BTC.abs().max())
    return maxima | {"train/act_max/logits": float(model.logits(x_BTC).abs().max())}


@torch.no_grad()
def continuation(
    model: LipschitzTransformer, prompt_T: Tensor, num_tokens: int, seed: int = 0
) -> Tensor:
    """Return the prompt and ``num_tokens`` sampled ids (one-dimensional), temperature 1.

    The last ``context`` ids are re-read for each token: simple, and no part of serving.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_T = prompt_T.clone()
    device = model.embedding.weight.device
    for _ in range(num_tokens):
        window_1T = ids_T[-model.config.context :][None].to(device)
        share_V = model(window_1T)[0, -1].float().softmax(dim=-1).cpu()
        ids_T = torch.cat((ids_T, torch.multinomial(share_V, 1, generator=generator)))
    return ids_T
