"""Every experiment's optimizer and constraint fit its own model, whatever its size."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from common.config import build
from common.models import LipschitzTransformer, MLPConfig
from train.groups import optimizer_defaults, parameter_groups
from train.images import with_last_layer
from train.optim import Muon
from train.session import read_settings

CONF = Path(__file__).resolve().parents[2] / "conf" / "experiment"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_settings_of_an_experiment_fit_its_model(name: str) -> None:
    """Oracle: the model without storage, partitioned as training does it; every pattern matches."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("train", overrides=[f"experiment={name}", "device=cpu"])
    settings = read_settings(config)
    with torch.device("meta"):
        if str(config.model._target_).endswith(MLPConfig.__name__):
            model = build(config.model).build(64, 10)
            settings = with_last_layer(settings, model)
        else:
            model = LipschitzTransformer(build(config.model, vocab_size=65))
    groups = parameter_groups(model, settings.optim, settings.constraint)
    optimizer = Muon(groups, **optimizer_defaults(settings.optim, settings.constraint))
    capped = [group for group in optimizer.param_groups if group["constraint"] != "none"]
    assert bool(capped) == (settings.constraint.kind != "none")
