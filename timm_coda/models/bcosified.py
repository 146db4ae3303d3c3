"""B-cos versions of timm's architectures, from scratch or from their pretrained weights.

Papers:
    `B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers` - https://arxiv.org/abs/2306.10898
    `B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable` - https://arxiv.org/abs/2411.00715

One model is registered, `bcosified`. Its argument `base` names an architecture in timm, so a saved folder contains
everything needed to create the model again. `bcosify` converts a model or a model name, with or without its weights.
"""

# torch annotates torch.jit.ignore only for calls with a flag:
# pyright: reportArgumentType=false

import copy
import json
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import adapt_input_conv, generate_default_cfgs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..explanation import Classes, ExplainMixin, explanation_mode, forget_names
from ..hub import HubMixin, create_recorded, get_model_args, get_model_input_config, register_model
from ..layers import BatchNormUncentered2d, DynamicLinear, GlobalPool, InverseEncoding, placement
from ._bcosify import bcos_classifier, bcos_logits, replace_modules
from ._builder import build_model

__all__ = ["Bcosified", "bcosify"]


class TokenMap(nn.Module):
    """Reshapes a transformer's tokens (B, N, C) to a map (B, C, rows, columns), without class and register tokens."""

    def __init__(self, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.prefix = prefix
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)

    def extra_repr(self) -> str:
        return f"prefix={self.prefix}, grid={self.grid}"


class Bcosified(ExplainMixin, HubMixin, nn.Module):
    """B-cos version of an architecture.

    Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes).

    The architecture's own network, `body`, takes the encoded image. A 1x1 B-cos convolution classifies each position of
    its last features, and the votes are pooled: logits = W(x) x + bias. The contribution of a transformer's position
    and class embeddings belongs to no pixel: it is `Explanation.residual`.

    Args:
        base: name of an architecture in timm's registry
        base_args: further arguments of the architecture, JSON-serialisable
        b: exponent B of all B-cos layers
        unit_norm: scale the weights of each unit to norm 1; B-cosification keeps the original norms
        keep_activations: keep activations, as B-cosification does; without them, the B-cos transform is the only
            non-linearity
        logit_temperature: T, divides the votes; a larger T gives sharper explanations and slower initial training
        logit_bias: b0, the logit of a class without evidence; None for -log(num_classes - 1)
        num_classes: number of classes; 0 returns pooled features
        in_chans: colour channels of an image; the encoding doubles them
        global_pool: 'avg', 'sum', or '' to return a logit map
        img_size: height and width in pixels, for architectures that need it
        drop_rate: dropout rate before the classifier
        drop_path_rate: stochastic depth rate of the architecture

    Raises:
        ValueError: timm has no such architecture, or a module has no B-cos counterpart; the message names it.
    """

    def __init__(
        self,
        base: str = "resnet18",
        base_args: dict[str, Any] | None = None,
        b: float = 2.0,
        unit_norm: bool = True,
        keep_activations: bool = False,
        logit_temperature: float = 1.0,
        logit_bias: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        own: dict[str, Any] = {"num_classes": 0, "global_pool": "", "in_chans": 2 * in_chans, "img_size": img_size}
        for name in (base_args or {}).keys() & own.keys():
            raise ValueError(f"base_args={base_args}: give {name} as a separate argument, not in base_args")
        if drop_path_rate > 0:
            own["drop_path_rate"] = drop_path_rate
        body: Any = timm.create_model(base, **(base_args or {}), **own, **dd)  # timm drops None
        if any(isinstance(m, DynamicLinear) for m in body.modules()):
            raise ValueError(f"base={base!r} already has exact explanations: create it without bcosified")
        try:
            replace_modules(body, b=b, unit_norm=unit_norm, keep_activations=keep_activations)
        except ValueError as error:
            raise ValueError(f"base={base!r} has no B-cos version: {error}") from error
        for module in body.modules():
            if isinstance(module, BatchNormUncentered2d):
                nn.init.ones_(module.weight)  # timm sets some residual branches to 0, the published networks none
        self.encoding = InverseEncoding(in_chans)
        self.body = body
        tokens = hasattr(body, "num_prefix_tokens")
        self.to_map = TokenMap(body.num_prefix_tokens, body.patch_embed.grid_size) if tokens else nn.Identity()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = body.num_features
        self.head_hidden_size = body.head_hidden_size
        self.feature_info = [dict(info, module=f"body.{info['module']}") for info in body.feature_info]
        self._head_args = {"b": b, "unit_norm": unit_norm}
        self._logit_args = (logit_temperature, logit_bias)
        self.global_pool = GlobalPool(global_pool)
        self.head = bcos_classifier(self.head_hidden_size, num_classes, **self._head_args, **dd)
        self.logits = bcos_logits(num_classes, logit_temperature, logit_bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = self.body.no_weight_decay() if hasattr(self.body, "no_weight_decay") else set()
        parameters = dict(self.named_parameters())
        return {f"body.{name}" for name in names if f"body.{name}" in parameters}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        def inside(pattern: str) -> str:
            return rf"^body\.(?:{pattern.removeprefix('^')})"

        groups: dict[str, Any] = self.body.group_matcher(coarse=coarse)
        return {
            name: inside(group) if isinstance(group, str) else [(inside(first), *rest) for first, *rest in group]
            for name, group in groups.items()
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.body.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        forget_names(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = GlobalPool(global_pool).train(self.training)
        head = bcos_classifier(self.head_hidden_size, num_classes, **self._head_args, **placement(self))
        self.head = head.train(self.training)
        self.logits = bcos_logits(num_classes, *self._logit_args).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the final and intermediate features, as the architecture's own method does."""
        return self.body.forward_intermediates(
            self.encoding(x),
            indices=indices,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers after the last of `indices`; return the selected feature indices."""
        kept = self.body.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        changed = self.head_hidden_size != self.body.head_hidden_size
        self.num_features, self.head_hidden_size = self.body.num_features, self.body.head_hidden_size
        if prune_head or changed:
            self.reset_classifier(0, "")
        return kept

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body.forward_features(self.encoding(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.to_map(self.body.forward_head(x))
        if pre_logits or self.num_classes == 0:
            return self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        x = self.head(x)
        x = self.global_pool(x)
        return self.logits(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def bcosify(
    model: str | nn.Module,
    *,
    from_pretrained: bool = False,
    num_classes: int | None = None,
    base_args: dict[str, Any] | None = None,
    b: float = 2.0,
    logit_temperature: float = 1.0,
    logit_bias: float | None = None,
) -> Bcosified:
    """Convert a timm model to its B-cos version, which has exact explanations.

    The result saves, loads and trains like any timm model.

    With `from_pretrained`, it starts from the original's weights by the rules of B-cosification (Arya et al., NeurIPS
    2024, arXiv 2411.00715, section 3). Activations are kept. Biases are dropped, and with them the means of BatchNorm,
    which fold into biases. Weights keep their norms. The first convolution takes (rgb, 1 - rgb) and absorbs the
    original's mean and standard deviation. The result then needs a few epochs of fine-tuning to reach the original's
    accuracy. Before that its predictions are poor, because its layers have not been trained to respond to alignment.

    Args:
        model: a model name for `timm.create_model`, or a model created by it, which is not modified
        from_pretrained: start from the weights of the model, or from the pretrained weights of the name
        num_classes: number of classes; None for the model's own. With another number the classifier is initialised anew
        base_args: further arguments of the architecture, JSON-serialisable; only with a name
        b: exponent B of all B-cos layers
        logit_temperature, logit_bias: as in `Bcosified`

    Returns:
        The B-cos model, with the original's device, dtype and mode.

    Raises:
        ValueError: a module has no B-cos counterpart, timm did not create the original, or a non-linear part remains
            that explanations cannot hold constant.
    """
    if isinstance(model, str):
        original: Any = create_recorded(model, pretrained=from_pretrained, **(base_args or {}))
    elif base_args is not None:
        raise ValueError(f"base_args={base_args}: only for a model name; a created model already has its arguments")
    else:
        original = model
    architecture = getattr(original, "pretrained_cfg", {}).get("architecture")
    if not architecture:
        raise ValueError(f"{type(original).__name__} has no architecture name: create it with timm.create_model")
    arguments = get_model_args(original)
    size = arguments.pop("img_size", None)
    for name in ("num_classes", "in_chans", "global_pool"):
        arguments.pop(name, None)
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise ValueError(f"{architecture} has arguments {arguments}, which cannot be saved as JSON: {error}") from error
    classes = original.num_classes if num_classes is None else num_classes
    created: Any = timm.create_model(
        "bcosified",
        base=architecture,
        base_args=arguments,
        b=b,
        unit_norm=not from_pretrained,
        keep_activations=from_pretrained,
        logit_temperature=logit_temperature,
        logit_bias=logit_bias,
        num_classes=classes,
        in_chans=get_model_input_config(original)["input_size"][0],  # older timm's ResNets have no `in_chans`
        img_size=size,
        **placement(original),
    )
    if from_pretrained:
        _carry_over(original, created)
    _check_linear(created)
    return created.train(original.training)


@torch.no_grad()
def _carry_over(original: Any, target: Bcosified) -> None:
    """Copy the original's weights by the rules of B-cosification."""
    source = copy.deepcopy(original)
    classifier = source.get_classifier()
    source.reset_classifier(0, "")
    name = source.pretrained_cfg["first_conv"]
    stem = source.get_submodule(name) if isinstance(name, str) else None
    if type(stem) is not nn.Conv2d or stem.groups != 1:
        raise ValueError(f"first_conv={name!r} is not a single nn.Conv2d, so it cannot be widened to (rgb, 1 - rgb)")
    parent, _, child = name.rpartition(".")
    setattr(source.get_submodule(parent), child, _see_encoded(stem, **_mean_and_std(source)))
    replace_modules(source, unit_norm=False, keep_activations=True)
    target.body.load_state_dict(source.state_dict())
    weight = getattr(classifier, "weight", None)
    if weight is None or weight.shape[1] != target.head_hidden_size:
        raise ValueError(f"the classifier ({classifier}) is not a single linear layer on the last features")
    if len(weight) == target.num_classes:
        target.head.load_state_dict({"weight": weight.reshape(*weight.shape[:2], 1, 1)})
        target.pretrained_cfg |= Classes.of(original).as_config()  # pyright: ignore[reportOperatorIssue]


def _mean_and_std(model: nn.Module) -> dict[str, Tensor]:
    config = resolve_model_data_config(model)
    return {name: torch.tensor(config[name]) for name in ("mean", "std")}


def _see_encoded(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> nn.Conv2d:
    """Convert a convolution of (rgb - mean) / std to one of (rgb, 1 - rgb), without its bias.

    With W' = W / std, the result is W' (1 - mean) rgb - W' mean (1 - rgb); its weights are [W', -W'] / 2 for mean 1/2.
    It is also exact at the border: the original is padded with the mean colour, the result with zeros in both halves,
    and both paddings contribute 0.
    """
    wide = nn.Conv2d(
        2 * conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # pyright: ignore[reportArgumentType]
        conv.stride,  # pyright: ignore[reportArgumentType]
        conv.padding,  # pyright: ignore[reportArgumentType]
        conv.dilation,  # pyright: ignore[reportArgumentType]
        bias=False,
        padding_mode=conv.padding_mode,
        **placement(conv),
    )
    mean, std = (values.to(conv.weight)[:, None, None] for values in (mean, std))
    scaled = conv.weight / std
    wide.weight.copy_(torch.cat([scaled * (1 - mean), -scaled * mean], 1))
    return wide.train(conv.training)


def _check_linear(model: Bcosified) -> None:
    """Raise ValueError if the gradient of the frozen model depends on the image, so that the model is not linear."""
    parameter = next(model.parameters())
    shape = get_model_input_config(model)["input_size"]
    image = model.encoding(torch.rand(1, *shape, device=parameter.device, dtype=parameter.dtype)).requires_grad_()
    # Fused attention has no second derivative.
    with torch.enable_grad(), explanation_mode(model.eval()), sdpa_kernel(SDPBackend.MATH):
        weights = torch.autograd.grad(model(image).sum(), image, create_graph=True)[0]
        if weights.requires_grad:
            curvature = torch.autograd.grad(weights.sum(), image, allow_unused=True)[0]
            if curvature is not None and curvature.count_nonzero():
                raise ValueError(
                    f"{type(model.body).__name__} computes something non-linear outside its modules, which an "
                    "explanation cannot hold constant: choose another architecture"
                )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Bcosified) -> dict[str, Tensor]:
    """Adapt weights to another number of colour channels, by timm's rule for each half of the encoding."""
    name = f"body.{model.body.pretrained_cfg['first_conv']}.weight"
    weight = state_dict.get(name)
    if weight is None or weight.shape[1] != 6 or model.in_chans == 3:
        return state_dict
    halves = [adapt_input_conv(model.in_chans, half) for half in weight.chunk(2, 1)]
    return state_dict | {name: torch.cat(halves, 1)}


default_cfgs = generate_default_cfgs(
    {
        "bcosified": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "first_conv": "body.conv1",
            "classifier": "head",
            "license": "apache-2.0",
            "paper_ids": "arXiv:2411.00715",
            "paper_name": "B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable",
        }
    }
)


@register_model
def bcosified(
    pretrained: bool = False,
    base: str = "resnet18",
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Bcosified:
    """Create the B-cos version of the architecture that `base` names."""
    if not timm.is_model(base):
        raise ValueError(f"base={base!r}: timm has no such architecture, see timm.list_models()")
    if not pretrained_cfg:  # a saved model has its own config
        config: Any = timm.get_pretrained_cfg(base)
        shared = ("input_size", "pool_size", "crop_pct", "interpolation", "fixed_input_size", "min_input_size")
        overlay = {name: getattr(config, name) for name in shared}
        first = config.first_conv
        overlay["first_conv"] = f"body.{first}" if isinstance(first, str) else None
        pretrained_cfg_overlay = overlay | (pretrained_cfg_overlay or {})
    return build_model(
        Bcosified,
        "bcosified",
        pretrained,
        checkpoint_filter_fn,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        base=base,
        **kwargs,
    )
