"""Run the `timm-coda` command by `python -m timm_coda`."""

import sys

from .cli import main

sys.exit(main())
