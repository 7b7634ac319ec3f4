"""Command ``export``: write a bundle as a folder of ``transformers``."""

from pathlib import Path

from omegaconf import DictConfig

from common.bundle import load_bundle
from common.config import build
from common.runs import Outcome, Run, hydra_command
from serve.export.folder import export_bundle
from serve.export.settings import ExportConfig

DEFAULT_FOLDER = "hugging_face"


def export(cfg: DictConfig, run: Run) -> Outcome:
    """Write the bundle that ``cfg.bundle`` names for ``AutoModelForCausalLM`` to load.

    Args:
        cfg: Keys ``bundle``, ``export``, ``force`` (replace an earlier export).
        run: Where the folder goes by default.

    Returns:
        No metrics; the artifact ``hugging_face``, and a note where the certificate is left out.

    Raises:
        LipError: for anything the user can correct.
    """
    settings: ExportConfig = build(cfg.export)
    path = Path(settings.path or run.directory / DEFAULT_FOLDER)
    missing = export_bundle(
        load_bundle(cfg.bundle),
        path,
        dtype=settings.dtype,
        replace=cfg.force or settings.path is None,
    )
    notes = {} if missing is None else {"certificate": missing}
    return Outcome(artifacts={"hugging_face": path}, notes=notes)


main = hydra_command("export", export)
