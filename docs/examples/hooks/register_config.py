"""The gate ``careful``, for ``gate@sft.gate=careful`` in any recipe."""

from collections.abc import Sequence
from pathlib import Path

from posttrain import hookimpl


@hookimpl
def register_config() -> Sequence[Path]:
    """Return the folder that holds ``conf/gate/careful.yaml``."""
    return [Path(__file__).with_suffix("")]
