"""`python -m timm_coda.cli`, where the `timm-coda` script is not on the path."""

import sys

from . import main

sys.exit(main())
