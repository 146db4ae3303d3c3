"""What `train.py` is made of: options, losses, updates, checkpoints for resuming, and the files of a run."""
