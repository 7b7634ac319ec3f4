"""Settings of the ``export`` command."""

from dataclasses import dataclass

from common.config import check_types, one_of

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Where the folder goes and how its weights are stored.

    Attributes:
        path: Folder to write; None for ``hugging_face`` in the run's directory.
        dtype: Type of the stored weights, one of ``DTYPES``; None keeps the bundle's (float32 for
            weights stored in half precision). Rounded weights lose the certificate.

    Raises:
        ConfigError: for an unknown type.
    """

    path: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_types(self, prefix="export.")
        if self.dtype is not None:
            one_of("export.dtype", self.dtype, DTYPES)
