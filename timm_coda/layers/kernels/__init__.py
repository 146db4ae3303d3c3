"""Implementations of the layers' operations: DAU backends, B-cos alignment, and uncentered batch normalisation."""
