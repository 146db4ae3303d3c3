"""B-cos vision transformers: the authors' numbers, exactness on other images, explanations by tokens, timm's suite."""

from itertools import pairwise
from math import log
from types import MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention

import golden
import timm_coda
from helpers import relative_error
from helpers.bcos_cases import assert_authors_numbers, layers_and_inputs
from helpers.timm_suite import run_timm_suite
from timm_coda.layers.attention import DynamicGroupNorm2d, DynamicLayerNorm, SinCosPositions, freezable
from timm_coda.layers.bcos import BcosConv2d, BcosLinear, EncodedBcosConv2d
from timm_coda.models import bcos_vit

SIZES = {"ti": "tiny", "s": "small", "b": "base", "l": "large"}
MODELS = [f"vit_{size}_{stem}_bcos_224" for stem in ("patch16", "convstem") for size in SIZES.values()]

# golden case: model
GOLDEN = {
    "bcosv2_simple_vit_ti_patch16_224_224px": "vit_tiny_patch16_bcos_224",
    "bcosv2_vitc_ti_patch1_14_224px": "vit_tiny_convstem_bcos_224",
}
STEMS = {"patches": {"patch_size": 8}, "stem": {"patch_size": 2, "stem": (8, 8, 12)}}


def tiny(stem, **arguments):
    """A small transformer with all kinds of parts, and with norm weights that differ from their initial values."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    model = timm_coda.BcosVisionTransformer(**sizes | STEMS[stem] | arguments)
    for module in model.modules():
        if isinstance(module, (DynamicLayerNorm, DynamicGroupNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.double().eval()


def image(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def published_file(case, folder):
    """Write the case's weights in the authors' format, under the published file name."""
    path = folder / timm.get_pretrained_cfg(GOLDEN[case]).url.rsplit("/", 1)[1]
    torch.save(golden.state_dict(case), path)
    return path


@pytest.mark.parametrize("case", GOLDEN)
def test_equals_the_authors_numbers(case, tmp_path):
    path = published_file(case, tmp_path)
    model = timm.create_model(GOLDEN[case], pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    loaded = model.load_state_dict(bcos_vit.checkpoint_filter_fn(torch.load(path), model))
    explanation = assert_authors_numbers(case, model, loaded)
    assert explanation.residual.abs().min() > 1e-5, "the position embedding's share"


@pytest.mark.parametrize("case", GOLDEN)
def test_published_file_fits_other_colours_and_classes(case, tmp_path):
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(published_file(case, tmp_path))}}
    colour, grey, four = (timm.create_model(GOLDEN[case], in_chans=n, num_classes=5, **source) for n in (3, 1, 4))
    weights = [model.get_submodule(model.first_conv).weight for model in (colour, grey, four)]
    assert relative_error(weights[1], weights[0].unflatten(1, (2, 3)).sum(2)) < 1e-6
    assert relative_error(weights[2][:, 4:7], 3 / 4 * weights[0][:, 3:]) < 1e-6
    assert torch.equal(grey.blocks[10].mlp.fc2.weight, colour.blocks[10].mlp.fc2.weight)
    assert grey(torch.rand(1, 1, 32, 32)).shape == (1, 5)


def freeze(model, x):
    """Fix the network's weights, variances and attention to their values at `x`, computed from the formulas."""
    kinds = BcosConv2d, BcosLinear, DynamicLayerNorm, DynamicGroupNorm2d, Attention
    for layer, p in layers_and_inputs(model, x, kinds):
        if isinstance(layer, BcosConv2d):
            frozen = frozen_convolution(layer, model.encoding(p) if isinstance(layer, EncodedBcosConv2d) else p)
        elif isinstance(layer, BcosLinear):
            weight = layer.weight / layer.weight.square().sum(1, keepdim=True).sqrt()
            factor = (p @ weight.T).abs() / p.square().sum(-1, keepdim=True).sqrt()
            frozen = lambda self, x, weight=weight, factor=factor: x @ weight.T * factor  # noqa: E731
        elif isinstance(layer, Attention):
            frozen = frozen_attention(layer, p)
        else:
            axes = -1 if isinstance(layer, DynamicLayerNorm) else (1, 2, 3)
            weight = layer.weight if axes == -1 else layer.weight[:, None, None]
            scale = weight / ((p - p.mean(axes, keepdim=True)).square().mean(axes, keepdim=True) + 1e-5).sqrt()
            frozen = lambda self, x, scale=scale, axes=axes: (x - x.mean(axes, keepdim=True)) * scale  # noqa: E731
        layer.forward = MethodType(frozen, layer)
    return model


def frozen_convolution(layer, p):
    weight = layer.weight / layer.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
    norm = F.conv2d(p.square(), torch.ones_like(weight), None, layer.stride, layer.padding)
    eps = 1e-6 if layer.padding == (1, 1) else 0  # the patch projection is published as a linear layer
    factor = F.conv2d(p, weight, None, layer.stride, layer.padding).abs() / (norm + eps).sqrt()

    def forward(self, x):
        x = self.encoding(x) if isinstance(self, EncodedBcosConv2d) else x
        return F.conv2d(x, weight, None, self.stride, self.padding) * factor

    return forward


def frozen_attention(layer, p):
    query, key, value = (w.unflatten(0, (layer.num_heads, -1)) for w in layer.qkv.weight.chunk(3))
    scores = torch.einsum("bnc,hdc,bmk,hdk->bhnm", p, query, p, key) / query.shape[1] ** 0.5
    matrix = scores.exp() / scores.exp().sum(-1, keepdim=True)

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.proj(torch.einsum("bhnm,bmc,hdc->bnhd", matrix, x, value).flatten(2))

    return forward


@torch.no_grad()
@pytest.mark.parametrize("stem", STEMS)
def test_map_is_that_of_the_frozen_network_on_any_other_image(stem):
    model = tiny(stem, logit_temperature=0.5, logit_bias=-1.25)
    x, other = image(2, 1, 3, 32, 48)
    explanation = model.explain(x, torch.arange(4)[None])
    logits = model(x)
    frozen = freeze(model, x)
    assert relative_error(frozen(x), logits) < 1e-12
    nothing = torch.zeros(1, 6, 32, 48, dtype=torch.float64)
    positions = frozen(nothing) + 1.25
    assert relative_error(explanation.residual, positions) < 1e-11
    assert positions.abs().min() > 1e-3
    for encoded in (torch.cat([x, 1 - x], 1), torch.cat([other, 1 - other], 1), nothing):
        share = (explanation.weights * encoded[:, None]).sum((2, 3, 4))
        assert relative_error(share, frozen(encoded) + 1.25 - positions) < 1e-11


@pytest.mark.parametrize("stem", STEMS)
def test_map_is_not_input_times_gradient(stem):
    model = tiny(stem)
    x = image(1, 3, 32, 32)
    encoded = torch.cat([x, 1 - x], 1).requires_grad_()
    gradient = torch.autograd.grad(model(encoded)[:, 0].sum(), encoded)[0]
    assert relative_error(gradient, model.explain(x, 0).weights) > 0.5


@pytest.mark.parametrize("stem", STEMS)
def test_nothing_is_left_behind_the_position_embedding(stem):
    model = tiny(stem)
    x = image(2, 3, 32, 48)
    by_map = model.explain(x, target=2, layer="positions")
    assert by_map.contributions.shape == (2, 4, 6)
    assert by_map.weights.shape == (2, 16, 4, 6)
    by_tokens = model.explain(x, target=2, layer="patch_drop")
    assert relative_error(by_tokens.weights, by_map.weights) < 1e-13
    assert relative_error(by_tokens.contributions, by_map.contributions) < 1e-13
    for layer in ("positions", "patch_drop", "blocks.0", "blocks.1"):
        explanation = model.explain(x, target=2, layer=layer)
        assert relative_error(explanation.contributions.sum((1, 2)), explanation.value - explanation.bias) < 1e-12
    before = model.explain(x, target=2, layer="patch_embed.proj").residual
    assert relative_error(before, model.explain(x, target=2).residual) < 1e-11
    with pytest.raises(ValueError, match=r"layer='fc_norm' outputs \[\[2, 16\]\]"):
        model.explain(x, layer="fc_norm")


def test_token_of_a_unit_is_where_its_pixels_are():
    model = tiny("patches")
    unit = model.explain(image(1, 3, 32, 48), layer="patch_drop", unit=(5, 1, 4))
    seen = unit.contributions[0] != 0
    assert seen[8:16, 32:40].all()
    assert seen.sum() == 64
    projection = model.patch_embed.proj(image(1, 3, 32, 48))[0, 5, 1, 4]
    assert relative_error(unit.contributions.sum(), projection) < 1e-12
    assert relative_error(unit.value - unit.residual, projection[None]) < 1e-12


def test_attention_without_the_fused_operation_is_the_same():
    model = tiny("stem")
    x = image(2, 3, 32, 32)
    fused = model.explain(x)
    for block in model.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    assert relative_error(model.explain(x).weights, fused.weights) < 1e-12


def test_attention_with_normalised_queries_freezes():
    torch.manual_seed(0)
    attention = freezable(Attention(8, 2, qk_norm=True, norm_layer=DynamicLayerNorm, proj_bias=False)).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    query, key, value = attention.qkv(x).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    scores = F.layer_norm(query, (4,)) @ F.layer_norm(key, (4,)).transpose(2, 3) / 2
    y = attention.proj((scores.softmax(3).detach() @ value).transpose(1, 2).flatten(2))
    expected = torch.autograd.grad(y[..., 0].sum(), x)[0]
    assert relative_error(attention(x), y) < 1e-12
    with timm_coda.explanation_mode(attention):
        assert relative_error(torch.autograd.grad(attention(x)[..., 0].sum(), x)[0], expected) < 1e-12
    assert relative_error(torch.autograd.grad(attention(x)[..., 0].sum(), x)[0], expected) > 0.01


@pytest.mark.parametrize(
    "norm", [DynamicLayerNorm(6), DynamicGroupNorm2d(6), DynamicGroupNorm2d(6, 3)], ids=["layer", "all", "groups"]
)
def test_norms(norm):
    torch.manual_seed(0)
    norm = norm.double()
    torch.nn.init.normal_(norm.weight)
    shape = (2, 3, 6) if isinstance(norm, DynamicLayerNorm) else (2, 6, 3, 4)
    x = (1 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    groups = x if x.dim() == 3 else x.reshape(2, norm.num_groups, -1)
    mean = groups.mean(-1, keepdim=True)
    scale = ((groups - mean).square().mean(-1, keepdim=True) + norm.eps).sqrt()
    weight = norm.weight if x.dim() == 3 else norm.weight[:, None, None]
    expected = ((groups - mean) / scale).reshape(shape) * weight
    assert relative_error(norm(x), expected) < 1e-13
    grad = torch.randn_like(x)
    assert relative_error(*(torch.autograd.grad(y, x, grad)[0] for y in (norm(x), expected))) < 1e-12
    linear = ((groups - mean) / scale.detach()).reshape(shape) * weight
    with timm_coda.explanation_mode(norm):
        y = norm(x)
        assert relative_error(y, expected) < 1e-13, "the value depends on the switch"
        assert relative_error(*(torch.autograd.grad(t, x, grad)[0] for t in (y, linear))) < 1e-12
    norm.float()
    low = norm(x.bfloat16())
    with timm_coda.explanation_mode(norm):
        assert low.dtype == norm(x.bfloat16()).dtype == torch.bfloat16
        assert relative_error(norm(x.bfloat16()), low) < 0.01
    assert relative_error(low, expected) < 0.01


def test_positions():
    y = SinCosPositions(8)(torch.zeros(1, 8, 3, 4))[0]
    for row in range(3):
        for column in range(4):
            angles = torch.tensor([column, column / 1e4, row, row / 1e4]).view(2, 2)
            expected = torch.stack([angles.sin(), angles.cos()], 1).flatten()
            assert relative_error(y[:, row, column], expected) < 1e-6
    with pytest.raises(ValueError, match="num_features=10"):
        SinCosPositions(10)


@pytest.mark.parametrize("stem", STEMS)
def test_batches_targets_and_low_precision(stem):
    model = tiny(stem)
    x = image(3, 3, 32, 48)
    whole = model.explain(x, top=2)
    split = model.explain(x, top=2, batch_size=1)
    assert torch.equal(split.target, whole.target)
    assert relative_error(split.weights, whole.weights) < 1e-12
    one = model.explain(x[1], whole.target[1:2, 1])
    assert relative_error(one.weights[0], whole.weights[1, 1]) < 1e-12
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.explain(x.float(), whole.target)
    assert relative_error(mixed.contributions, whole.contributions) < 0.1
    low = model.bfloat16().explain(x.bfloat16(), whole.target)
    assert low.logits.dtype == torch.bfloat16
    assert relative_error(low.contributions, whole.contributions) < 0.1


def test_explaining_in_training_leaves_the_model():
    model = tiny("stem", drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="call model.eval"):
        by_tokens = model.explain(image(3, 3, 32, 32), layer="blocks.0")
    assert by_tokens.residual.abs().max() < 1e-12
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_compiled_model_follows_explanation_mode():
    model = tiny("stem", depth=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = image(2, 3, 32, 32)
    expected = model.explain(x, 1)
    assert relative_error(timm_coda.explain(compiled, x, 1).weights, expected.weights) < 1e-12
    encoded = torch.cat([x, 1 - x], 1).requires_grad_()
    with timm_coda.explanation_mode(compiled):
        gradient = torch.autograd.grad(compiled(encoded)[:, 1].sum(), encoded)[0]
    assert relative_error(gradient, expected.weights) < 1e-12
    plain, fast = (torch.autograd.grad(run(encoded)[:, 1].sum(), encoded)[0] for run in (model, compiled))
    assert relative_error(fast, plain) < 1e-12


@pytest.mark.parametrize("stem", STEMS)
def test_gradient_checkpointing_changes_nothing(stem):
    model = tiny(stem)
    x = image(2, 3, 32, 32)
    gradients, maps = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
        maps.append(model.explain(x).weights)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert relative_error(checkpointed, plain) < 1e-12
    assert relative_error(maps[1], maps[0]) < 1e-12


def test_registered_with_the_published_files():
    assert {name for name in timm.list_models("vit_*_bcos_*") if timm.is_model(name)} == set(MODELS)
    for name in MODELS:
        config = timm.get_pretrained_cfg(name)
        _, size, stem, _, _ = name.split("_")
        short = {long: short for short, long in SIZES.items()}[size]
        expected = f"bcos_simple_vit_{short}_patch16_224" if stem == "patch16" else f"bcos_vitc_{short}_patch1_14"
        file, digest = config.url.rsplit("/", 1)[1].removesuffix(".pth").rsplit("-", 1)
        assert file == expected
        assert len(digest) == 10
        assert int(digest, 16) >= 0
        assert config.tag == "v2_in1k"
        assert config.license == "apache-2.0"
        transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))
        steps = {type(step).__name__: step for step in transform.transforms}
        assert steps["Resize"].size == 256
        assert steps["Resize"].interpolation.value == "bilinear"
        assert tuple(steps["CenterCrop"].size) == (224, 224)
        assert steps["Normalize"].mean.tolist() == [0, 0, 0]
        assert steps["Normalize"].std.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("size", "width", "depth", "channels"),
    [
        ("tiny", 192, 12, (6, 24, 48, 96, 192)),
        ("small", 384, 12, (6, 48, 96, 192, 384)),
        ("base", 768, 12, (6, 64, 128, 128, 256, 256, 512)),
        ("large", 1024, 14, (6, 64, 128, 128, 256, 256, 512)),
    ],
)
def test_sizes(size, width, depth, channels):
    simple, early = (
        timm.create_model(f"vit_{size}_{kind}_bcos_224", device="meta") for kind in ("patch16", "convstem")
    )
    block = 12 * width**2 + 2 * width
    rest = width + 1000 * width  # the last norm, the classifier
    assert sum(p.numel() for p in simple.parameters()) == 6 * 16**2 * width + depth * block + rest
    stem = sum(9 * c * d + d for c, d in pairwise(channels)) + channels[-1] * width
    assert sum(p.numel() for p in early.parameters()) == stem + (depth - 1) * block + rest
    for model in (simple, early):
        assert {b.attn.head_dim for b in model.blocks} == {64}
        assert model.forward_features(torch.rand(1, 3, 224, 224, device="meta")).shape == (1, 196, width)


def test_classifier_pooling_and_sizes():
    model = tiny("stem")
    assert model.logits.bias == -log(3)
    model.reset_classifier(11)
    assert model.logits.bias == -log(10)
    assert model.get_classifier().weight.shape == (11, 16)
    model.reset_classifier(5, "")
    assert model(image(1, 3, 32, 48)).shape == (1, 24, 5)
    with pytest.raises(ValueError, match="no pooled classifier"):
        model.explain(image(1, 3, 32, 48))
    with pytest.raises(ValueError, match="global_pool='max'"):
        model.reset_classifier(5, "max")
    model.set_input_size((64, 32))
    assert model.patch_embed.grid_size == (8, 4)
    with pytest.raises(ValueError, match="patch_size=4"):
        model.set_input_size(patch_size=4)
    with pytest.raises(ValueError, match="img_size=36: both sides must be multiples of a token's 8 pixels"):
        tiny("stem", img_size=36)
    with pytest.raises(AssertionError, match=r"image side \(38\) should be divisible by 4"):
        model(image(1, 3, 32, 38))
    with pytest.raises(TypeError):
        tiny("patches", class_token=True)
    with pytest.raises(ValueError, match="num_groups=4 does not divide 6 channels"):
        DynamicGroupNorm2d(6, 4)


def test_saved_model_comes_back(tmp_path):
    model = timm.create_model("vit_tiny_convstem_bcos_224", depth=1, stem=(8, 16), embed_dim=12, num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization="both")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "vit_tiny_convstem_bcos_224" else pytest.mark.slow) for n in MODELS]
)
def test_timm_suite(name, tmp_path):
    """timm's own tests, unchanged; a file with the published name is in timm's download cache."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(timm.create_model(name).state_dict(), folder / timm.get_pretrained_cfg(name).url.rsplit("/", 1)[1])
    run_timm_suite(name, home=tmp_path)
