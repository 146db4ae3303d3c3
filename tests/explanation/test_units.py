"""Units of inner layers: exact maps at their strongest positions, where these are, and which pixels they see."""

import copy

import numpy as np
import pytest
import timm
import torch

import timm_coda
from helpers import relative_error
from timm_coda.explanation import Unit, from_no_pixel, heatmap, peaks, receptive_fields, unit_pictures


def network(name: str, size: int):
    torch.manual_seed(0)
    options = {"img_size": size} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=4, **options).double().eval()


def noise(size: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def output(model, layer: str, images: torch.Tensor) -> torch.Tensor:
    """The layer's output as a map (B, C, H, W)."""
    found = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *call: found.append(call[2].detach()))
    model(images)
    handle.remove()
    if found[0].dim() == 3:  # tokens of a square image
        side = round(found[0].shape[1] ** 0.5)
        return found[0].transpose(1, 2).unflatten(2, (side, side))
    return found[0]


CASES = [
    ("coda_net_xs", 16, "stages.1.1"),
    ("coda_net_xs", 16, "head"),
    ("bcos_resnet18", 32, "layer2"),
    ("bcos_v1_conv9", 16, "stages.1"),
    ("bcos_convnext_tiny", 32, "stages.0"),
    ("vit_tiny_patch16_bcos_224", 32, "patch_embed"),
]


@pytest.mark.parametrize(("name", "size", "layer"), CASES)
def test_strongest_position_is_explained_exactly(name, size, layer):
    model, images = network(name, size), noise(size)
    maps = output(model, layer, images)
    assert maps.shape[2] > 1, "there are several positions to choose from"
    found = model.explain(images, layer=layer, unit=(1, "max"))
    assert found.contributions.shape == (2, size, size) and (found.layer, found.unit, found.bias) == (layer, (1,), 0)
    assert relative_error(found.value, maps[:, 1].amax((1, 2))) < 1e-12
    assert relative_error(found.contributions.sum((1, 2)) + found.bias, found.value) < 1e-9
    for number, (row, column) in enumerate(found.position.tolist()):
        assert maps[number, 1, row, column] == maps[number, 1].max()
        there = model.explain(images[number], layer=layer, unit=(1, row, column))
        assert relative_error(found.contributions[number], there.contributions[0]) < 1e-9
        assert there.position.tolist() == [[row, column]]
    encoded = model.encoding(images).requires_grad_()
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *call: kept.append(call[2]))
    model(encoded)
    handle.remove()
    gradient = torch.autograd.grad(kept[0].flatten(2)[:, 1].amax(1).sum(), encoded)[0]
    assert relative_error(gradient, found.weights) > 0.1, "the gradient also turns the weights"


def test_the_rest_of_a_token_is_the_position_embedding():
    model, images = network("vit_tiny_patch16_bcos_224", 32), noise(32)
    found = model.explain(images, layer="blocks.1", unit=(7, "max"))
    added = []

    def split(module, args, result):  # x + embedding, with a gradient for the embedding
        added.append((result - args[0]).detach().requires_grad_())
        return args[0] + added[0]

    kept = []
    handles = [
        model.positions.register_forward_hook(split),
        model.blocks[1].register_forward_hook(lambda *call: kept.append(call[2])),
    ]
    with timm_coda.explanation_mode(model):
        model(images)
        unit = kept[0].transpose(1, 2)[:, 7].amax(1)
        share = (torch.autograd.grad(unit.sum(), added[0])[0] * added[0]).flatten(1).sum(1)
    for handle in handles:
        handle.remove()
    assert relative_error(found.residual, share) < 1e-9
    assert from_no_pixel(found) == [f"{number:.4g}" for number in share.tolist()], "more than 1 % of the activation"
    assert from_no_pixel(model.explain(images, layer="patch_embed", unit=(7, "max"))) == ["", ""]
    assert relative_error(found.contributions.sum((1, 2)) + share, found.value) < 1e-9


def test_batches_indexing_and_files(tmp_path):
    model, images = network("coda_net_xs", 16), noise(16, 5)
    found = model.explain(images, layer="stages.1", unit=(3, "max"))
    parts = model.explain(images, layer="stages.1", unit=(3, "max"), batch_size=2)
    assert torch.equal(parts.position, found.position) and relative_error(parts.value, found.value) < 1e-12
    best = found[found.value.argsort(descending=True)[:2]]
    assert best.position.shape == (2, 2) and best.value[0] == found.value.max()
    row, column = best.position[0].tolist()
    texts = [text.get_text() for axes in best.plot().axes for text in axes.texts]
    assert f"stages.1 3, {row}, {column}" in texts
    best.save(tmp_path / "best.npz")
    with np.load(tmp_path / "best.npz") as arrays:
        assert arrays["position"].tolist() == best.position.tolist() and arrays["unit"].tolist() == [3]
    assert model.explain(images, layer="stages.1", unit=3).position is None, "a sum over positions has none"


def test_peaks_are_those_of_explain():
    model, images = network("coda_net_xs", 16), noise(16, 3)
    units = [Unit("stages.2", 1), Unit.parse("stages.0.1:5"), Unit("stages.2", 0)]
    values, positions = peaks(model, images, units)
    assert (values.shape, positions.shape, values.dtype) == ((3, 3), (3, 3, 2), torch.float64)
    for number, unit in enumerate(units):
        found = model.explain(images, layer=unit.layer, unit=(unit.channel, "max"))
        assert torch.equal(values[:, number], found.value) and torch.equal(positions[:, number], found.position)
    assert peaks(copy.deepcopy(model).bfloat16(), images.bfloat16(), units)[0].dtype == torch.float32


@pytest.mark.parametrize("text", ["stages", "stages.1:", ":3", "stages.1:-1", "stages.1:x", "stages.1:1.5", ""])
def test_units_that_are_not_written_so(text):
    with pytest.raises(ValueError, match="write LAYER:CHANNEL with a channel from 0, such as"):
        Unit.parse(text)
    assert str(Unit.parse("a.0:12")) == "a.0:12"


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ((32, "max"), r"layer 'stages.1' has size \[32, 8, 8\]; its channels are 0 to 31"),
        ((-1, "max"), "its channels are 0 to 31"),
        ((3, "min"), r"give a channel, or \(channel, row, column\), or \(channel, 'max'\)"),
        ((3, "max", 0), r"or \(channel, 'max'\)"),
        ((3, 8, 0), r"unit=\(3, 8, 0\): layer 'stages.1' has size"),
        (("max",), "its channels are 0 to 31"),
        ((), "give a channel"),
    ],
)
def test_units_that_there_are_not(unit, message):
    with pytest.raises(ValueError, match=message):
        network("coda_net_xs", 16).explain(noise(16), layer="stages.1", unit=unit)


def spans(layers: list[tuple[int, int, int]], position: int) -> tuple[int, int]:
    """First and last pixel + 1 of a position after layers of (kernel, stride, padding), also outside of the image."""
    first, last = position, position
    for kernel, stride, padding in reversed(layers):
        first, last = first * stride - padding, last * stride - padding + kernel - 1
    return first, last + 1


THREE = (3, 1, 1)
FIELDS = {
    ("coda_net_xs", "stages.0.0", 24): [THREE],
    ("coda_net_xs", "stages.1", 24): [THREE, THREE, (3, 2, 1), THREE, THREE],
    ("bcos_resnet18", "conv1", 40): [(7, 2, 3)],
    ("bcos_resnet18", "layer1.0", 40): [(7, 2, 3), (3, 2, 1), THREE, THREE],
    ("vit_tiny_patch16_bcos_224", "patch_embed", 48): [(16, 16, 0)],
}


@pytest.mark.parametrize(("name", "layer", "size"), FIELDS)
def test_receptive_fields_by_arithmetic(name, layer, size):
    model = network(name, size)
    side = output(model, layer, noise(size)).shape[2]
    places = [(0, side - 1), (side // 2, side // 2), (side - 1, 1)]
    boxes = receptive_fields(model.float(), layer, places, (size, size))
    for (row, column), box in zip(places, boxes, strict=True):
        assert [(box.top, box.bottom), (box.left, box.right)] == [
            spans(FIELDS[name, layer, size], place) for place in (row, column)
        ]


def test_under_inference_mode_and_autocast():
    model = network("coda_net_xs", 16).float()
    expected = receptive_fields(model, "stages.1", [(0, 7)], (16, 16))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert receptive_fields(model, "stages.1", torch.tensor([[0, 7]]), (16, 16)) == expected
        found = model.explain(noise(16).float(), layer="stages.1", unit=(1, "max"))
        assert found.value.dtype == torch.float32 and found.position.shape == (2, 2)


def test_nothing_outside_of_a_receptive_field_is_seen():
    """By changing pixels, without a gradient; the model keeps its dtype and mode."""
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    images = noise(16, 1)
    (box,) = receptive_fields(model, "stages.1", [(4, 5)], (16, 16))
    assert (model.head.up.weight.dtype, model.training, box.bottom - box.top) == (torch.float32, False, 15)
    model.double()
    before = output(model, "stages.1", images)[0, :, 4, 5]
    for row in range(16):
        for column in range(0, 16, 3):
            inside = box.top <= row < box.bottom and box.left <= column < box.right
            changed = images.clone()
            changed[..., row, column] = 1 - changed[..., row, column]
            assert torch.equal(output(model, "stages.1", changed)[0, :, 4, 5], before) != inside
    found = model.explain(images, layer="stages.1", unit=(2, 4, 5))
    seen = found.contributions[0].nonzero()
    assert seen[:, 0].min() >= box.top and seen[:, 0].max() < box.bottom and seen[:, 1].max() < box.right


def test_attention_sees_everything_and_no_weights_see_nothing():
    assert receptive_fields(network("vit_tiny_patch16_bcos_224", 32), "blocks.0", [(1, 0)], (32, 32)) == [
        (0, 0, 32, 32)
    ]
    model = network("coda_net_xs", 16)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert receptive_fields(model, "stages.0", [(3, 3)], (16, 16)) == [(0, 0, 16, 16)]


def test_pictures_show_the_field_and_one_scale():
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    images = noise(16, 3).float()
    found = model.explain(images, layer="stages.0.0", unit=(3, "max"))
    found = model.explain(images, layer="stages.0.0", unit=(3, 0, 9)) if 0 in found.position else found
    corner = model.explain(images[:1], layer="stages.0.0", unit=(3, 0, 15))
    boxes = receptive_fields(model, "stages.0.0", corner.position, (16, 16))
    assert boxes == [(-1, 14, 2, 17)]
    ((seen, colours, signed),), limit = unit_pictures(corner, boxes)
    assert seen.shape == colours.shape == signed.shape == (3, 3, 3)
    inside = (slice(1, 3), slice(0, 2))
    for pixels in (seen, colours, signed):
        outside = np.ones((3, 3), bool)
        outside[inside] = False
        assert (pixels[outside] == 200).all()
    expected = np.rint(255 * corner.images[0, :, :2, 14:].permute(1, 2, 0).numpy())
    assert np.array_equal(seen[inside], expected)
    assert np.array_equal(signed[inside], heatmap(corner.contributions[0, :2, 14:], limit=limit))
    boxes = receptive_fields(model, "stages.0.0", found.position, (16, 16))
    pictures, limit = unit_pictures(found, boxes)
    for number, (box, picture) in enumerate(zip(boxes, pictures, strict=True)):
        if min(box) >= 0 and max(box) <= 16:
            part = found.contributions[number, box.top : box.bottom, box.left : box.right]
            assert np.array_equal(picture.signed, heatmap(part, limit=limit))
