"""B-cos VGG, built from timm's VGG.

Papers:
    `B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers` - https://arxiv.org/abs/2306.10898
    `Very Deep Convolutional Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1409.1556

B-cos v2 with the authors' ImageNet weights: timm's VGG with batch normalisation, with its modules replaced (see
`_bcosify.py`) and B = 2. The first fully connected layer is a padded 7x7 convolution that keeps every position. Each
position votes for the classes, and the votes are pooled. logits = W(x) x + bias.
"""

import re
from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models.vgg import VGG, cfgs
from torch import Tensor, nn

from ..hub import register_model
from ..layers import GlobalPool
from ._bcos_v2 import BcosHead, v2_cfg, v2_weights
from ._bcosify import bcos_classifier, bcos_logits, replace_modules
from ._builder import build_model

__all__ = ["BcosVGG"]


class BcosVGG(BcosHead, VGG):
    """B-cos VGG.

    Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes).

    Args:
        cfg, mlp_ratio, drop_rate: as in timm's `VGG`
        b: exponent B of all B-cos layers
        logit_temperature: T, divides the votes; a larger T gives sharper explanations and slower initial training
        logit_bias: b0, the logit of a class without evidence; None for -log(num_classes - 1)
        num_classes: number of classes; 0 returns pooled features
        in_chans: colour channels of an image; the encoding doubles them
        global_pool: 'avg', 'sum', or '' to return a logit map
    """

    classifier_name = "head"

    def __init__(
        self,
        cfg: list[Any],
        mlp_ratio: float = 1.0,
        b: float = 2.0,
        logit_temperature: float = 1.0,
        logit_bias: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            cfg,
            num_classes=0,
            in_chans=2 * in_chans,
            mlp_ratio=mlp_ratio,
            norm_layer=nn.BatchNorm2d,
            global_pool="",
            drop_rate=drop_rate,
            **dd,
        )
        mlp: Any = self.pre_logits
        mlp.fc1.padding = (3, 3)
        mlp.input_kernel_size = 1  # because of the padding, maps below 7x7 need not be enlarged
        replace_modules(self, "features.0", b=b)
        first: Any = self.features[0]
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.encoding = first.encoding
        self._head_args = {"b": b}
        self._logit_args = (logit_temperature, logit_bias)
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = GlobalPool(global_pool)
        self.head = bcos_classifier(self.head_hidden_size, num_classes, b=b, **dd)
        self.logits = bcos_logits(num_classes, logit_temperature, logit_bias)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pre_logits(x)
        if pre_logits or self.num_classes == 0:
            return self.global_pool(x)
        x = self.head_drop(x)
        x = self.head(x)
        x = self.global_pool(x)
        return self.logits(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's method, which assumes a different head."""
        kept, last = feature_take_indices(len(self.feature_ends), indices)
        self.features = self.features[: self.feature_ends[last] + 1]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < len(self.feature_ends) - 1:
            self.pre_logits = nn.Identity()
            self.head_hidden_size = self.num_features
            self.reset_classifier(0, "")
        return kept


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: BcosVGG) -> dict[str, Tensor]:
    # Published names do not number timm's activations, and call all layers of the head "classifier".
    counted = [i for i, layer in enumerate(model.features) if not isinstance(layer, nn.Identity)]
    names = {f"features.{published}": f"features.{ours}" for published, ours in enumerate(counted)}
    names |= {"classifier.0": "pre_logits.fc1", "classifier.1": "pre_logits.fc2", "classifier.2": "head"}
    part = re.compile(r"^(features|classifier)\.\d+")
    return v2_weights(state_dict, model, "features.0", lambda name: part.sub(lambda m: names.get(m[0], m[0]), name))


default_cfgs = generate_default_cfgs(
    {"bcos_vgg11.v2_in1k": v2_cfg("vgg_11_bnu-34036029f0.pth", 69.31, "features.0", "head")}
)


@register_model
def bcos_vgg11(pretrained: bool = False, **kwargs: Any) -> BcosVGG:
    return build_model(
        BcosVGG,
        "bcos_vgg11",
        pretrained,
        checkpoint_filter_fn,
        model_cfg=cfgs["vgg11"],
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3, 4, 5)},
        **kwargs,
    )
