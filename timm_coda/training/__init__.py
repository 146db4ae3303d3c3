"""Building blocks of `train.py`: options, losses, updates, checkpoints for resuming, and the files of a run."""
