"""Captum adapter: exact contributions as an attribution method, for NoiseTunnel, infidelity and sensitivity_max."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..explanation import Explanation
from .colors import explain_colors

try:
    from captum.attr import Attribution
    from captum.log import log_usage  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    raise ImportError("this adapter needs Captum: pip install 'timm_coda[evaluate]'") from error

Target = int | Sequence[int] | Tensor | None


class InherentAttribution(Attribution):
    """Exact contribution of each channel of each pixel, (N, C, H, W). The contributions sum to logit - bias.

    For colours, channel c gets the contributions of both of its encodings, W_c x_c + W_{1-c} (1 - x_c), so that the sum
    over channels is `Explanation.contributions`. For encoded inputs, (N, 2C, H, W), each encoded channel has its own.

    Args:
        model: a timm_coda model, or `ValidColors` around one. Methods that add noise need `ValidColors`: a plain model
            warns about colours outside [0, 1].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model

    @property
    def multiplies_by_inputs(self) -> bool:
        return True

    def has_convergence_delta(self) -> bool:
        return True

    @log_usage()  # NoiseTunnel calls attribute.__wrapped__, which this sets
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor],
        target: Target = None,
        additional_forward_args: None = None,
        return_convergence_delta: bool = False,
    ) -> Tensor | tuple[Tensor] | tuple[Tensor | tuple[Tensor], Tensor]:
        """Return attributions of the shape of `inputs`, as a tensor, or as a tuple of one if `inputs` is a tuple.

        Args:
            inputs: colours in [0, 1], (N, C, H, W), or encoded images, (N, 2C, H, W)
            target: a class, N classes, or None for the prediction
            additional_forward_args: must be None, because the models take only images
            return_convergence_delta: return (attributions, delta), see `compute_convergence_delta`

        Raises:
            ValueError: more than one input, additional arguments, or an argument that `explain` rejects.
        """
        images = _only(inputs)
        if additional_forward_args is not None:
            raise ValueError(f"additional_forward_args={additional_forward_args!r}: the models take only images")
        explanation = explain_colors(self.model, images, _classes(target))
        weights, colors = explanation.weights, explanation.images
        if images.shape[1] == weights.shape[1]:
            shares = weights * images.detach().to(weights)
        else:
            direct, inverse = weights.chunk(2, 1)
            shares = direct * colors + inverse * (1 - colors)
        shares = shares.to(images)
        result = (shares,) if isinstance(inputs, tuple) else shares
        return (result, self._delta(shares, images, explanation)) if return_convergence_delta else result

    def compute_convergence_delta(
        self,
        attributions: Tensor | tuple[Tensor],
        start_point: None,
        end_point: Tensor | tuple[Tensor],
        target: Target = None,
        additional_forward_args: None = None,
    ) -> Tensor:
        """Return sum of the attributions - (logit at `end_point` - logit with all encoded channels 0), (N,).

        The delta is 0 up to rounding, unless the architecture leaves a residual (`Explanation.residual`).

        Raises:
            ValueError: `start_point` is given. The baseline cannot be given as colours: no image has all encoded
                channels 0.
        """
        if start_point is not None:
            raise ValueError("start_point must be None: contributions are relative to all encoded channels being 0")
        images = _only(end_point)
        explanation = explain_colors(self.model, images, _classes(target))
        return self._delta(_only(attributions), images, explanation)

    def _delta(self, shares: Tensor, images: Tensor, explanation: Explanation) -> Tensor:
        with torch.no_grad():
            start = self.model(torch.zeros_like(explanation.weights[:1], dtype=images.dtype))[0]
        value = explanation.value - start[explanation.target]
        return shares.flatten(1).sum(1) - value.to(shares)


def _only(inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} inputs: expected one, the images")
    return tensors[0]


def _classes(target: Target) -> Target:
    """Convert a tensor with one element, which Captum also uses for one class for all images, to an int."""
    return int(target.item()) if isinstance(target, Tensor) and target.numel() == 1 else target
