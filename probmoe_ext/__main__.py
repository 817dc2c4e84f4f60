"""``python -m probmoe_ext`` is the command ``probmoe``."""

from __future__ import annotations

import sys

from probmoe_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
