"""What one of two processes does for ``test_statistics.py``: python statistics_rank.py FOLDER.

It collects statistics with the other one, again from its file, and saves the sums.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from common.models import LipschitzTransformer, ModelConfig
from compress.adapters import adapter_for
from compress.statistics.collect import collect
from compress.statistics.storage import save_statistics


def job():
    """Return the same model and tokens in every process; four tokens at a time are a batch."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=11, width=8, layers=2, heads=2, context=16)
    return LipschitzTransformer(config).double(), torch.randint(11, (9, 16))


def main():
    """Collect twice: the second time everything is in the files already."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    adapter = adapter_for(job()[0])
    for name in ("first", "second"):
        statistics = collect(adapter, job()[1], adapter.targets(), path=folder / "sums.st")
        save_statistics(folder / f"{name}-{dist.get_rank()}.st", statistics)
    dist.destroy_process_group()


if __name__ == "__main__":
    import compress.statistics.collect

    compress.statistics.collect.BATCH_NUMBERS = 16
    main()
