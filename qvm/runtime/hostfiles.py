"""Files of the host for plugins: replaced in one step, and locked."""

from qvm.locks import lock
from qvm.paths import replace_file

__all__ = ["lock", "replace_file"]
