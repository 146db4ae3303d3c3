"""B-cos vision transformers, built from timm's VisionTransformer: simple ViTs, and ViT-Cs with a convolutional stem.

Papers:
    `B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers` - https://arxiv.org/abs/2306.10898
    `Better plain ViT baselines for ImageNet-1k` - https://arxiv.org/abs/2205.01580 (simple ViT)
    `Early Convolutions Help Transformers See Better` - https://arxiv.org/abs/2106.14881 (ViT-C)

The networks of B-cos v2 with the authors' ImageNet weights. B = 2 in the patch projection, the attention's output
projection, the MLP and the classifier. Queries, keys and values are plain linear maps. There are no biases and no
activations. The position embedding is fixed. The classifier follows the pooling, as published. The convolutional stem
and the position embedding are our own, because timm's differ (no last norm, other frequencies).

The position embedding is added, so a part of each logit comes from no pixel: logits = W(x) x + W'(x) e + bias, where e
is the embedding and W' the map from the patches on. `Explanation.residual` is that part. For explanations by a layer
after the embedding, such as `layer="blocks.0"`, the residual is only rounding errors.
"""

# torch annotates torch.jit.ignore only for calls with a flag:
# pyright: reportArgumentType=false

import re
from functools import partial
from typing import Any

from timm.layers import Format, HybridEmbed, PatchEmbed, _assert, to_2tuple
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..explanation import ExplainMixin, forget_names
from ..hub import from_bcos_v2, register_model
from ..layers import (
    BcosConv2d,
    BcosLinear,
    DynamicGroupNorm2d,
    DynamicLayerNorm,
    EncodedBcosConv2d,
    SinCosPositions,
    freezable,
    placement,
)
from ._bcosify import bcos_logits
from ._builder import build_model

__all__ = ["BcosVisionTransformer"]

_NORM_EPS = 1e-24  # of the published linear layers, which include the patch projection


def _pooling(global_pool: str) -> str:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool={global_pool!r}: choose 'avg' or '' (none); others are not linear")
    return global_pool


class ConvStem(nn.Sequential):
    """3x3 B-cos convolutions, each with a norm: images (B, C, H, W) to (B, channels[-1], H / stride, W / stride).

    The first convolution, and each one with more outputs than inputs, halves the resolution.
    """

    def __init__(self, in_chans: int, channels: tuple[int, ...], b: float, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.stride = 1
        seen = 0
        for i, units in enumerate(channels):
            options = {"stride": 2 if units > seen else 1, "padding": 1, "b": b, **dd}
            encoded = EncodedBcosConv2d(in_chans, units, 3, **options) if i == 0 else None
            self.add_module(f"conv{i}", encoded or BcosConv2d(seen, units, 3, **options))
            self.add_module(f"norm{i}", DynamicGroupNorm2d(units, **dd))
            self.stride *= options["stride"]
            seen = units
        self.num_features = seen

    def forward(self, x: Tensor) -> Tensor:
        for side in (2, 3):
            size = x.shape[side]
            _assert(
                size % self.stride == 0, f"image side ({size}) should be divisible by {self.stride}: resize or pad it"
            )
        for layer in self:
            x = layer(x)
        return x


def _bcos_linear(linear: nn.Linear, b: float) -> BcosLinear:
    layer = BcosLinear(linear.in_features, linear.out_features, b=b, norm_eps=_NORM_EPS, device="meta")
    layer.weight = nn.Parameter(linear.weight)
    return layer


class BcosVisionTransformer(ExplainMixin, VisionTransformer):
    """B-cos vision transformer.

    Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes). The contribution
    of the position embedding belongs to no pixel: it is the `residual` of an explanation.

    Args:
        img_size: height and width of the default image in pixels; other multiples of the stride work too, because the
            position embedding extends to any size
        patch_size: side of a token, in pixels, or in positions of the stem's output if there is a stem
        embed_dim, depth, num_heads, mlp_ratio: as in timm's `VisionTransformer`
        stem: channels of the convolutions before the patches (ViT-C); None for no stem
        b: exponent B of all B-cos layers
        logit_temperature: T, divides the votes; a larger T gives sharper explanations and slower initial training
        logit_bias: b0, the logit of a class without evidence; None for -log(num_classes - 1)
        num_classes: number of classes; 0 returns pooled features
        in_chans: colour channels of an image; the encoding doubles them
        global_pool: 'avg', or '' to return the logits of each token
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: as in timm's `VisionTransformer`

    Raises:
        ValueError: another pooling, or an image size that is not a multiple of the stride.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        stem: tuple[int, ...] | None = None,
        b: float = 2.0,
        logit_temperature: float = 1.0,
        logit_bias: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        embed_layer = PatchEmbed
        stride = patch_size
        if stem is not None:
            backbone = ConvStem(in_chans, stem, b, **dd)
            size = (height // backbone.stride, width // backbone.stride)
            embed_layer = partial(HybridEmbed, backbone=backbone, feature_size=size, feature_ratio=backbone.stride)
            stride = patch_size * backbone.stride
        if height % stride or width % stride:
            raise ValueError(f"img_size={img_size}: both sides must be multiples of a token's {stride} pixels")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=2 * in_chans,
            num_classes=0,
            global_pool=_pooling(global_pool),
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=False,
            proj_bias=False,
            class_token=False,
            pos_embed="none",
            fc_norm=True,
            dynamic_img_size=True,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            weight_init="skip",
            embed_layer=embed_layer,
            norm_layer=DynamicLayerNorm,
            act_layer=nn.Identity,
            **dd,
        )
        self.in_chans = in_chans
        self._head_args = {"b": b, "norm_eps": _NORM_EPS}
        self._logit_args = (logit_temperature, logit_bias)
        embed: Any = self.patch_embed
        blocks: Any = self.blocks
        projection = embed.proj
        seen = in_chans if stem is None else projection.in_channels
        conv = EncodedBcosConv2d if stem is None else BcosConv2d
        embed.proj = conv(seen, embed_dim, patch_size, stride=patch_size, device="meta", **self._head_args)
        embed.proj.weight = nn.Parameter(projection.weight)
        embed.output_fmt = Format.NCHW  # the positions are added to the map
        self.first_conv = "patch_embed.proj" if stem is None else "patch_embed.backbone.conv0"
        self.encoding = self.get_submodule(self.first_conv).encoding
        self.positions = SinCosPositions(embed_dim)
        for block in blocks:
            freezable(block.attn)
            block.attn.proj = _bcos_linear(block.attn.proj, b)
            block.mlp.fc1 = _bcos_linear(block.mlp.fc1, b)
            block.mlp.fc2 = _bcos_linear(block.mlp.fc2, b)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        forget_names(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _pooling(global_pool)
        head = nn.Identity()
        if num_classes > 0:
            head = BcosLinear(self.num_features, num_classes, **self._head_args, **placement(self))
        self.head = head.train(self.training)
        self.logits = bcos_logits(num_classes, *self._logit_args).train(self.training)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        if patch_size is not None and to_2tuple(patch_size) != self.patch_embed.patch_size:
            raise ValueError(f"patch_size={patch_size}: B-cos patches cannot be resampled; create the model with it")
        super().set_input_size(img_size)

    def no_weight_decay(self) -> set[str]:
        return set()

    def _pos_embed(self, x: Tensor) -> Tensor:
        return self.pos_drop(self.positions(x).flatten(2).transpose(1, 2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pool(x)
        x = self.fc_norm(x)
        x = self.head_drop(x)
        if pre_logits or self.num_classes == 0:
            return x
        return self.logits(self.head(x))


_NAMES = (  # B-cos v2's name, our name
    (r"^0\.", ""),
    (r"\.linear\.", "."),
    (r"^to_patch_embedding\.linear\.", "patch_embed.proj."),
    (r"^transformer\.encoder_(\d+)\.", r"blocks.\1."),
    (r"\.attn\.norm\.", ".norm1."),
    (r"\.attn\.to_qkv\.", ".attn.qkv."),
    (r"\.attn\.to_out\.", ".attn.proj."),
    (r"\.ff\.net\.norm\.", ".norm2."),
    (r"\.ff\.net\.linear(\d)\.", r".mlp.fc\1."),
    (r"^linear_head\.norm\.", "fc_norm."),
    (r"^linear_head\.linear\.", "head."),
)


def _stem_name(found: re.Match) -> str:
    conv, part = divmod(int(found[1]), 3)
    return f"patch_embed.backbone.{('conv', 'norm')[part]}{conv}."


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: BcosVisionTransformer) -> dict[str, Tensor]:
    """Convert B-cos v2's state dict to our names, also for another number of colour channels. Ours keep their names."""
    converted = {}
    for name, value in state_dict.items():
        for theirs, ours in _NAMES:
            name = re.sub(theirs, ours, name)
        name = re.sub(r"^to_patch_embedding\.conv_stem\.(\d+)\.", _stem_name, name)
        if name == "patch_embed.proj.weight" and value.dim() == 2:  # of a linear layer, (D, rows * columns * C)
            rows, columns = model.patch_embed.patch_size
            value = value.unflatten(1, (rows, columns, -1)).permute(0, 3, 1, 2).contiguous()
        converted[name] = value
    return from_bcos_v2(converted, model.in_chans, model.first_conv)


def _cfg(file: str = "", top1: float = 0.0, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"https://github.com/B-cos/B-cos-v2/releases/download/v0.0.1-weights/{file}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 224 / 256,
        "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "description": f"ImageNet-1k top-1 {top1:.2f} % as its authors report.",
        "origin_url": "https://github.com/B-cos/B-cos-v2",
        "paper_ids": "arXiv:2306.10898",
        "paper_name": "B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers",
        **kwargs,
    }


_WIDE_STEM = (64, 128, 128, 256, 256, 512)
_STEM = {"first_conv": "patch_embed.backbone.conv0"}

default_cfgs = generate_default_cfgs(
    {
        "vit_tiny_patch16_bcos_224.v2_in1k": _cfg("bcos_simple_vit_ti_patch16_224-4b0824b1c1.pth", 59.96),
        "vit_small_patch16_bcos_224.v2_in1k": _cfg("bcos_simple_vit_s_patch16_224-75e99d1f73.pth", 69.25),
        "vit_base_patch16_bcos_224.v2_in1k": _cfg("bcos_simple_vit_b_patch16_224-1fc4750806.pth", 74.41),
        "vit_large_patch16_bcos_224.v2_in1k": _cfg("bcos_simple_vit_l_patch16_224-9613b2ad0a.pth", 75.06),
        "vit_tiny_convstem_bcos_224.v2_in1k": _cfg("bcos_vitc_ti_patch1_14-ddd6193a77.pth", 67.26, **_STEM),
        "vit_small_convstem_bcos_224.v2_in1k": _cfg("bcos_vitc_s_patch1_14-cf55c88f0c.pth", 74.50, **_STEM),
        "vit_base_convstem_bcos_224.v2_in1k": _cfg("bcos_vitc_b_patch1_14-a13c46397b.pth", 77.15, **_STEM),
        "vit_large_convstem_bcos_224.v2_in1k": _cfg("bcos_vitc_l_patch1_14-8739e18b8d.pth", 77.78, **_STEM),
    }
)


def _create_bcos_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> BcosVisionTransformer:
    return build_model(
        BcosVisionTransformer,
        variant,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def vit_tiny_patch16_bcos_224(pretrained: bool = False, **kwargs: Any) -> BcosVisionTransformer:
    model_args = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create_bcos_vit("vit_tiny_patch16_bcos_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_patch16_bcos_224(pretrained: bool = False, **kwargs: Any) -> BcosVisionTransformer:
    model_args = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create_bcos_vit("vit_small_patch16_bcos_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vit_base_patch16_bcos_224(pretrained: bool = False, **kwargs: Any) -> BcosVisionTransformer:
    model_args = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create_bcos_vit("vit_base_patch16_bcos_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vit_large_patch16_bcos_224(pretrained: bool = False, **kwargs: Any) -> BcosVisionTransformer:
    model_args = {"embed_dim": 1024, "depth": 14, "num_heads": 16}
    return _create_bcos_vit("vit_large_patch16_bcos_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vit_tiny_convstem_bcos_224(pretrained: bool = False, **kwargs: Any) -> BcosVisionTransformer:
    model_args = {"patch_size": 1, "embed_dim": 192, "depth": 11, "num_heads": 3, "stem": (24, 48, 96, 192)}
    return _create_bcos_vit("vit_tiny_convstem_bcos_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vit_small_convstem_bcos_224(pretrained: bool = False, **kwargs: Any) -> BcosVisionTransformer:
    model_args = {"patch_size": 1, "embed_dim": 384, "depth": 11, "num_heads": 6, "stem": (48, 96, 192, 384)}
    return _create_bcos_vit("vit_small_convstem_bcos_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vit_base_convstem_bcos_224(pretrained: bool = False, **kwargs: Any) -> BcosVisionTransformer:
    model_args = {"patch_size": 1, "embed_dim": 768, "depth": 11, "num_heads": 12, "stem": _WIDE_STEM}
    return _create_bcos_vit("vit_base_convstem_bcos_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vit_large_convstem_bcos_224(pretrained: bool = False, **kwargs: Any) -> BcosVisionTransformer:
    model_args = {"patch_size": 1, "embed_dim": 1024, "depth": 13, "num_heads": 16, "stem": _WIDE_STEM}
    return _create_bcos_vit("vit_large_convstem_bcos_224", pretrained, **dict(model_args, **kwargs))
