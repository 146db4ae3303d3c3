"""Measure speed and memory: against the published formulation, against an ordinary model, and by image size."""

from .comparison import compare
from .macs import Macs, count_macs, share_of_products
from .measurement import BenchmarkError, Setup, measure
from .scaling import measure_scaling
from .table import benchmark_table, comparison_table, scaling_table

__all__ = [
    "BenchmarkError",
    "Macs",
    "Setup",
    "benchmark_table",
    "compare",
    "comparison_table",
    "count_macs",
    "measure",
    "measure_scaling",
    "scaling_table",
    "share_of_products",
]
