"""What programs of the tests import, see processes.py."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import timm.optim
import timm.scheduler  # noqa: F401
import torch  # noqa: F401

import timm_coda.data
import timm_coda.evaluate
import timm_coda.training.runs
import timm_coda.training.trackers  # noqa: F401
