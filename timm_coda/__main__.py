"""`python -m timm_coda`: the `timm-coda` command."""

import sys

from .cli import main

sys.exit(main())
