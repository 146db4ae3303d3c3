"""`explain`: exactness, arguments, side effects, precision, threads, wrapped models and errors."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_coda
from helpers import relative_error
from timm_coda import Explanation, explain, explanation_mode
from timm_coda.layers import reference
from timm_coda.layers.dau import DAUConv2d

CLASSES = 4


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = timm_coda.CodaNet(
        depths=(1, 1, 1), channels=(4, 6, 5), strides=(1, 2, 1), rank=3, num_classes=CLASSES, logit_temperature=2.0
    )
    return net.double().eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layer_matrices(model, x):
    """Explicit matrix of every DAU layer at one image, built from the dynamic weights of reference.py."""
    x = model.encoding(x[None])
    matrices = []
    for layer in (m for m in model.modules() if isinstance(m, DAUConv2d)):
        geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        factors = (layer.down.weight, layer.up.weight, layer.up.bias)
        w = reference.dynamic_weights(x, *factors, **geometry, activation=layer.activation)[0]  # (D, K, H, W)
        # Find the origin of each patch entry: unfold the input's own indices, with 0 for padding.
        index = torch.arange(1, x.numel() + 1, dtype=torch.float64).view_as(x)
        origin = torch.nn.functional.unfold(index, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        origin = origin[0].long()  # (K, L)
        units, inputs = w.shape[:2]
        matrix = torch.zeros(units, origin.shape[1], x.numel() + 1, dtype=torch.float64)
        for d in range(units):
            for k in range(inputs):
                for position in range(origin.shape[1]):
                    matrix[d, position, origin[k, position]] += w[d, k].flatten()[position]
        matrices.append(matrix[..., 1:].flatten(0, 1))
        x = layer(x)
    pool = torch.eye(CLASSES, dtype=torch.float64).repeat_interleave(x[0, 0].numel(), 1) / model.logits.temperature
    return [*matrices, pool]


def compose(matrices):
    product = matrices[0]
    for matrix in matrices[1:]:
        product = matrix @ product
    return product


@torch.no_grad()
def test_equals_the_composition_of_the_frozen_layer_matrices(model, images):
    targets = torch.arange(CLASSES).expand(3, -1)
    explanation = model.explain(images, targets)
    for n, image in enumerate(images):
        expected = compose(layer_matrices(model, image)).view(CLASSES, 6, 7, 6)
        assert relative_error(explanation.weights[n], expected) < 1e-10
        encoded = torch.cat([image, 1 - image])
        assert relative_error(explanation.contributions[n], (expected * encoded).sum(1)) < 1e-10
        logits = (expected * encoded).sum((1, 2, 3)) + model.logits.bias
        assert relative_error(model(images)[n], logits) < 1e-10


@torch.no_grad()
def test_inner_layers_are_exact(model, images):
    layers = ["stages.0.0", "stages.1.0", "stages.2.0", "head"]
    by_layer = {name: model.explain(images, 2, layer=name) for name in layers}
    for n, image in enumerate(images):
        matrices = layer_matrices(model, image)
        x = model.encoding(image[None])
        for i, name in enumerate(layers):
            x = model.get_submodule(name)(x)
            inner = by_layer[name]
            expected = compose(matrices[i + 1 :])[2].view_as(x[0])
            assert relative_error(inner.weights[n], expected) < 1e-10
            assert relative_error(inner.contributions[n], (expected * x[0]).sum(0)) < 1e-10
            assert inner.residual.abs().max() < 1e-12

            unit = model.explain(images, layer=name, unit=(1, 2, 1))
            rows = compose(matrices[: i + 1]).view(*x.shape[1:], 6, 7, 6)
            assert relative_error(unit.weights[n], rows[1, 2, 1]) < 1e-10
            assert unit.value[n].item() == pytest.approx(x[0, 1, 2, 1].item(), rel=1e-12)
            whole = model.explain(images, layer=name, unit=1)
            assert relative_error(whole.weights[n], rows[1].sum((0, 1))) < 1e-10
            assert (unit.bias, unit.unit, whole.unit, whole.layer) == (0, (1, 2, 1), (1,), name)


def test_is_not_input_times_gradient(model, images):
    explanation = model.explain(images, 0)
    x = model.encoding(images).requires_grad_()
    gradient = torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
    assert relative_error(gradient, explanation.weights) > 0.1


@torch.no_grad()
def test_targets_in_every_form(model, images):
    logits = model(images)
    every = model.explain(images, torch.arange(CLASSES).expand(3, -1))
    assert every.contributions.shape == (3, CLASSES, 7, 6)
    assert every.weights.shape == (3, CLASSES, 6, 7, 6)
    prediction = model.explain(images)
    assert torch.equal(prediction.prediction, logits.argmax(1))
    assert torch.equal(prediction.target, prediction.prediction)
    for target in (1, [1, 1, 1], np.array([1, 1, 1]), torch.tensor([1, 1, 1], dtype=torch.int32), torch.tensor(1)):
        explanation = model.explain(images, target)
        assert explanation.target.tolist() == [1, 1, 1]
        assert torch.equal(explanation.contributions, every.contributions[:, 1])
    mixed = model.explain(images, [3, 0, 2])
    assert torch.equal(mixed.contributions, every.contributions[range(3), [3, 0, 2]])
    top = model.explain(images, top=2)
    assert torch.equal(top.target, logits.topk(2).indices)
    assert torch.equal(top.value, logits.topk(2).values)
    assert every.residual.abs().max() < 1e-12


@torch.no_grad()
def test_contrast_is_the_difference_of_two_maps(model, images):
    every = model.explain(images, torch.arange(CLASSES).expand(3, -1))
    contrast = model.explain(images, 3, versus=1)
    assert relative_error(contrast.contributions, every.contributions[:, 3] - every.contributions[:, 1]) < 1e-12
    assert relative_error(contrast.value, every.logits[:, 3] - every.logits[:, 1]) < 1e-12
    assert (contrast.bias, contrast.versus.tolist()) == (0, [1, 1, 1])
    several = model.explain(images, [[0, 1], [2, 3], [1, 1]], versus=[[3, 3], [0, 0], [2, 0]])
    assert relative_error(several.contributions[1, 1], every.contributions[1, 3] - every.contributions[1, 0]) < 1e-12
    runner_up = model.explain(images, top=2, versus=[0, 1, 2])
    assert runner_up.versus.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert several.residual.abs().max() < 1e-12


@torch.no_grad()
def test_input_in_every_form(model, images):
    expected = model.explain(images, 0)
    encoded = model.explain(torch.cat([images, 1 - images], 1), 0)
    assert torch.equal(encoded.contributions, expected.contributions)
    assert torch.equal(encoded.images, images)
    single = model.explain(images[0], 0)
    assert single.contributions.shape == (1, 7, 6)
    assert relative_error(single.contributions[0], expected.contributions[0]) < 1e-12
    blank = model.explain(torch.zeros(1, 6, 7, 6, dtype=torch.float64), 0)
    assert blank.contributions.abs().max() == 0, "no evidence in no light at all"
    low = model.explain(images.float(), 0)
    assert low.contributions.dtype == torch.float64, "computed in the model's precision"


def test_pictures_go_through_the_models_own_transform():
    torch.manual_seed(0)
    model = timm.create_model("coda_net_xs.digits", rank=2).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    explanation = model.explain(Image.fromarray(pixels))
    assert torch.equal(explanation.images[0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    resized = model.explain([Image.new("L", (40, 20), 128), Image.new("RGBA", (16, 16)), Image.new("CMYK", (9, 9))])
    assert resized.images.shape == (3, 3, 16, 16)
    assert len(model.explain([Image.new("P", (40, 20))] * 3, batch_size=2)) == 3
    grey = timm.create_model("coda_net_xs.digits", rank=2, in_chans=1).eval()
    assert grey.explain(Image.fromarray(pixels)).images.shape == (1, 1, 16, 16)


@torch.no_grad()
def test_batch_size_bounds_the_batch_and_changes_nothing(model, images):
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    whole = model.explain(images, [[0, 1], [2, 3], [1, 2]])
    parts = model.explain(images, [[0, 1], [2, 3], [1, 2]], batch_size=2)
    handle.remove()
    assert seen == [3, 2, 1], "one forward pass a batch, whatever the number of targets"
    assert len(parts) == 3
    assert relative_error(parts.contributions, whole.contributions) < 1e-12
    assert torch.equal(parts.target, whole.target)


def snapshot(model, images):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    flags = [(m.training, bool(getattr(m, "frozen_dynamics", False))) for m in model.modules()]
    parameters = [(p.requires_grad, p.grad, p.clone(), p.dtype) for p in model.parameters()]
    return hooks, flags, parameters, (images.requires_grad, images.grad, images.clone()), torch.get_rng_state()


def assert_same(before, after):
    for old, new in zip(before, after, strict=True):
        if isinstance(old, (list, tuple)):
            assert_same(old, new)
        elif isinstance(old, torch.Tensor):
            assert torch.equal(old, new)
        else:
            assert old == new


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inner", [None, "stages.1"])
def test_leaves_everything_as_it_was(model, images, training, inner):
    model.train(training)
    next(model.parameters()).requires_grad_(False)
    for tensor in (images, images.clone().requires_grad_()):
        before = snapshot(model, tensor)
        first = model.explain(tensor, 0, layer=inner)
        kept = first.contributions.clone()
        second = model.explain(tensor, 1, layer=inner)
        assert_same(before, snapshot(model, tensor))
        assert torch.equal(first.contributions, kept), "a second call must not overwrite the first result"
        assert not second.contributions.requires_grad
    model.explain(images, 0).images.zero_()
    assert images.abs().sum() > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_contexts(model, images, context):
    expected = model.explain(images, 0)
    with context():
        explanation = model.explain(images * 1, 0)
    assert torch.equal(explanation.contributions, expected.contributions)
    assert not explanation.contributions.is_inference()


def test_low_precision(model, images):
    expected = model.explain(images, 0)
    single = copy.deepcopy(model).float().explain(images.float(), 0)
    assert relative_error(single.contributions, expected.contributions) < 1e-5
    half = copy.deepcopy(model).bfloat16().explain(images.float(), 0)
    assert (half.logits.dtype, half.contributions.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(half.contributions, expected.contributions) < 3e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = copy.deepcopy(model).float().explain(images.float(), 0)
    assert relative_error(mixed.contributions, expected.contributions) < 3e-2
    assert mixed.residual.abs().max() < 3e-2


def test_eight_threads_at_once(model, images):
    """Eight threads explain one class each, half of them inside explanation_mode; a ninth takes ordinary gradients."""
    x = images.clone().requires_grad_()
    free = torch.autograd.grad(model(x).sum(), x)[0]
    every = model.explain(images, torch.arange(CLASSES).expand(3, -1)).contributions
    start = threading.Barrier(9)

    def explain_often(worker):
        start.wait()
        for _ in range(20):
            with explanation_mode(model) if worker % 2 else torch.no_grad():
                result = model.explain(images, worker % CLASSES, layer=None).contributions
                layered = model.explain(images, worker % CLASSES, layer="stages.0")
            assert torch.equal(result, every[:, worker % CLASSES])
            assert layered.residual.abs().max() < 1e-12

    def train_often():
        start.wait()
        for _ in range(40):
            mine = images.clone().requires_grad_()
            assert torch.equal(torch.autograd.grad(model(mine).sum(), mine)[0], free)

    with ThreadPoolExecutor(9) as pool:
        for future in [pool.submit(train_often), *(pool.submit(explain_often, i) for i in range(8))]:
            future.result(timeout=120)
    assert not any(m._forward_hooks for m in model.modules())


def test_nested_in_explanation_mode_and_after_an_error(model, images):
    expected = model.explain(images, 0).contributions
    x = images.clone().requires_grad_()
    free = torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
    with pytest.raises(RuntimeError, match="on purpose"), explanation_mode(model):
        with explanation_mode(model):
            assert torch.equal(model.explain(images, 0).contributions, expected)
        frozen = torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
        assert relative_error(frozen, free) > 1e-2, "the inner exit must not switch the outer off"
        raise RuntimeError("on purpose")
    assert torch.equal(torch.autograd.grad(model(x)[:, 0].sum(), x)[0], free)

    handle = model.stages[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.explain(images, layer="stages.0")
    handle.remove()
    assert torch.equal(torch.autograd.grad(model(x)[:, 0].sum(), x)[0], free)
    assert torch.equal(model.explain(images, 0).contributions, expected)


def test_after_reset_classifier(model, images):
    model.explain(images)
    model.reset_classifier(9)
    explanation = model.explain(images, 8)
    assert relative_error(explanation.weights, model.explain(images, 8).weights) == 0
    assert explanation.residual.abs().max() < 1e-12
    with explanation_mode(model):
        assert model.head.frozen_dynamics
    model.reset_classifier(0)
    with pytest.raises(ValueError, match=r"no pooled classifier to explain.*reset_classifier"):
        model.explain(images)


def test_wrapped_models(model, images, tmp_path):
    expected = model.explain(images, 0).contributions
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        for wrapped in (model, ddp, torch.compile(model, backend="eager"), torch.compile(ddp, backend="eager")):
            assert torch.equal(explain(wrapped, images, 0).contributions, expected)
        with explanation_mode(ddp):
            assert model.head.frozen_dynamics
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(TypeError, match="Linear cannot explain itself"):
        explain(torch.nn.Linear(2, 2), images)
    with pytest.raises(ValueError, match="Linear has no dynamic-linear layer"), explanation_mode(torch.nn.Linear(2, 2)):
        pass


def test_whole_model_survives_pickling_and_copying(model, images):
    expected = model.explain(images, 0).contributions
    with explanation_mode(model):
        twins = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    for twin in twins:
        assert not any(getattr(m, "frozen_dynamics", False) for m in twin.modules())
        assert torch.equal(twin.explain(images, 0).contributions, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.rand(2, 4, 7, 6)}, ValueError, r"got \[2, 4, 7, 6\]"),
        ({"images": torch.rand(7, 6)}, ValueError, r"got \[7, 6\]"),
        ({"images": torch.rand(0, 3, 7, 6)}, ValueError, "the batch is empty"),
        ({"images": []}, ValueError, "the batch is empty"),
        ({"images": torch.zeros(2, 3, 7, 6, dtype=torch.uint8)}, TypeError, "images / 255"),
        ({"images": np.zeros((2, 3, 7, 6))}, TypeError, "images are ndarray: give a tensor"),
        ({"images": torch.rand(2, 3, 1, 6)}, ValueError, "1x6 pixels is smaller than the network's stride"),
        (
            {"images": torch.tensor([[0.0], [float("nan")]]).view(2, 1, 1, 1).expand(2, 3, 7, 6)},
            ValueError,
            r"images \[1\] have NaN",
        ),
        ({"target": 4}, ValueError, "target=4: the model's classes are 0 to 3"),
        ({"target": [0, 1, -1]}, ValueError, "target=-1: the model's classes are 0 to 3"),
        ({"target": [0, 1]}, ValueError, r"target has shape \[2\] for 3 images"),
        ({"target": 1.5}, TypeError, "target has dtype torch.float32: give class indices"),
        ({"versus": 7}, ValueError, "versus=7"),
        ({"target": 1, "top": 2}, ValueError, "target=1 and top=2 exclude each other: give only one"),
        ({"top": 5}, ValueError, "top=5: the model has 4 classes"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        (
            {"layer": "stages.9"},
            ValueError,
            r"layer='stages.9': no such layer; choose for example one of stages.0.0, .*head",
        ),
        (
            {"layer": "logits"},
            ValueError,
            r"layer='logits' outputs \[\[3, 4\]\] in a forward pass: choose a layer that outputs one map \(B, C, H",
        ),
        ({"layer": "head.down"}, ValueError, "layer='head.down' outputs nothing"),
        ({"unit": 1}, ValueError, "unit= needs layer="),
        (
            {"layer": "head", "unit": 4},
            ValueError,
            r"unit=\(4,\): layer 'head' has size \[4, 4, 3\]",
        ),
        ({"layer": "head", "unit": (0, 4, 0)}, ValueError, r"unit=\(0, 4, 0\)"),
        ({"layer": "head", "unit": (0, 1)}, ValueError, "give a channel, or"),
        ({"layer": "head", "unit": 1, "target": 2}, ValueError, "excludes target="),
    ],
)
def test_bad_input_is_named_and_harmless(model, images, change, error, message):
    before = snapshot(model, images)
    with pytest.raises(error, match=message):
        model.explain(**{"images": images} | change)
    assert_same(before, snapshot(model, images))
    with pytest.raises(TypeError, match="trget"):
        model.explain(images, trget=1)


def test_normalised_images_are_called_out(model, images):
    with pytest.warns(UserWarning, match=r"from -2\.\d+ to 2\.\d+, outside \[0, 1\].*normalised by mean and std"):
        model.explain((images - 0.45) / 0.2, 0)
    with pytest.warns(UserWarning, match="outside") as record:
        explain(model, images * 3, 0)
    assert len(record) == 1


def test_explanation_is_a_batch(model, images, tmp_path):
    explanation = model.explain(images, top=2)
    assert isinstance(explanation, Explanation)
    assert len(explanation) == 3
    assert [len(part) for part in explanation] == [1, 1, 1]
    assert torch.equal(explanation[-1].contributions, explanation.contributions[2:])
    assert torch.equal(explanation[1:].value, explanation.value[1:])
    assert torch.equal(explanation[[2, 0]].images, images[[2, 0]])
    assert explanation[0].bias == model.logits.bias
    with pytest.raises(IndexError, match="image index 3 is out of range: the explanation has 3 images"):
        explanation[3]
    with pytest.raises(AttributeError):
        explanation.bias = 1
    assert len(repr(explanation)) < 250
    assert "3 images, 3x2x7x6 contributions" in repr(explanation)
    assert pickle.loads(pickle.dumps(explanation)).bias == explanation.bias


@pytest.mark.parametrize(
    "arguments",
    [{}, {"top": 3}, {"target": 1, "versus": 2}, {"layer": "stages.1"}, {"layer": "stages.1", "unit": (1, 2, 1)}],
    ids=["prediction", "top", "versus", "layer", "unit"],
)
def test_pictures(model, images, arguments, tmp_path):
    model.pretrained_cfg = {"label_names": ["cat", "dog", "car", "ship"]}
    explanation = model.explain(images, **arguments)
    figure = explanation.plot()
    texts = [t.get_text() for axes in figure.axes for t in axes.texts]
    if "versus" in arguments:
        assert "dog, not car" in texts
    elif "unit" in arguments:
        assert "stages.1 1, 2, 1" in texts
    else:
        assert "cat" in texts
    maps = explanation.contributions.shape
    assert explanation.heatmap().shape == (*maps, 3)
    assert explanation.overlay().shape == (*maps[:-2], 7, 6, 3)
    if "layer" not in arguments:
        assert explanation.rgba().shape == (*maps, 4)
    for name in ("figure.png", "figure.svg", "figure.pdf"):
        explanation.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    assert explanation._repr_png_().startswith(b"\x89PNG")
