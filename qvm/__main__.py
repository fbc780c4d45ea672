"""`qvm` and `python -m qvm`: the only place that exits the process."""

from __future__ import annotations

import sys

from qvm.cli.main import run


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
