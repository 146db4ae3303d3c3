"""Backends of `functional.dau_conv2d`, one file each."""
