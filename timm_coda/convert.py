"""Published checkpoints in our names."""

import torch
from timm.models import adapt_input_conv
from torch import Tensor

__all__ = ["from_bcos_v2"]


def from_bcos_v2(state_dict: dict[str, Tensor], in_chans: int = 3, first_conv: str = "conv1") -> dict[str, Tensor]:
    """Weights of B-cos v2 (torchvision's names, `.linear.` inside each B-cos layer) under torchvision's names alone.

    Left out is what the networks never read: the running mean of normalisations that subtract none, and the count of
    batches. A state dict in our own names comes back as it is.

    Args:
        state_dict: as published, or ours
        in_chans: colours of the target's images; weights of both halves of the encoding are adapted by timm's rule
        first_conv: name of the first layer, which sees (rgb, 1 - rgb)
    """
    unread = ("running_mean", "num_batches_tracked")
    converted = {k.replace(".linear.", "."): v for k, v in state_dict.items() if not k.endswith(unread)}
    name = f"{first_conv}.weight"
    weight = converted.get(name)
    if weight is not None and weight.shape[1] == 6 and in_chans != 3:
        halves = [adapt_input_conv(in_chans, half, base_chans=3) for half in weight.chunk(2, 1)]
        converted[name] = torch.cat(halves, 1)
    return converted
