"""Random DAU problems of many shapes, shared by the tests of every implementation."""

import torch

# name: input (B, C, H, W), units, rank, kernel, stride, padding, dilation
CASES = {
    "3x3": ((2, 6, 8, 8), 5, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    "stride": ((2, 4, 9, 7), 3, 2, (3, 3), (2, 2), (1, 1), (1, 1)),
    "1x1": ((3, 8, 5, 5), 10, 6, (1, 1), (1, 1), (0, 0), (1, 1)),
    "one_position": ((1, 3, 4, 4), 2, 3, (4, 4), (1, 1), (0, 0), (1, 1)),
    "one_pixel_one_unit_rank_1": ((1, 2, 1, 1), 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    "rectangular": ((2, 3, 11, 6), 4, 5, (5, 2), (2, 1), (2, 0), (1, 1)),
    "dilated": ((1, 2, 9, 9), 3, 4, (3, 3), (1, 2), (2, 1), (2, 1)),
    "large_stem": ((1, 6, 20, 20), 16, 12, (7, 7), (3, 3), (3, 3), (1, 1)),
}


def problem(case: str, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], dict]:
    """Leaf tensors x, down, up, up_bias and the keyword arguments of a case, always the same."""
    shape, units, rank, kernel, stride, padding, dilation = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int, scale: float = 1.0) -> torch.Tensor:
        values = scale * torch.randn(*size, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    channels = shape[1]
    inputs = channels * kernel[0] * kernel[1]
    tensors = [
        leaf(*shape),
        leaf(rank, channels, *kernel, scale=inputs**-0.5),
        leaf(units * rank, channels, *kernel, scale=rank**-0.5),
        leaf(units, channels, *kernel, scale=0.5),
    ]
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation}
