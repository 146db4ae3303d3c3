"""The base of all layers: weights that transformers finds in no checkpoint."""

import pytest
import timm
import torch
from timm.models import _manipulate

import timm_coda
from timm_coda import hub, layers

reinit_non_persistent_buffers = getattr(_manipulate, "reinit_non_persistent_buffers", None)
hooked = pytest.mark.skipif(reinit_non_persistent_buffers is None, reason="this timm does not call the hook")
MODELS = {
    "coda_net": ("coda_net_xs", {"depths": (1, 1, 1), "channels": (8, 8, 8), "strides": (1, 2, 2), "rank": 4}),
    "bcos": ("bcos_resnet20", {}),
    "bcos_v1": ("bcos_v1_conv9", {}),
    "bcosified": ("bcosified", {"base": "resnet10t"}),
    "vit": ("vit_tiny_patch16_bcos_224", {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32}),
}


@pytest.fixture
def nan_for_memory_that_is_not_set():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_for_memory_that_is_not_set")
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_gives_a_new_classifier_the_weights_of_a_fresh_one(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.initialization", reason="transformers 4 does not call our hook")
    torch.manual_seed(0)
    name, arguments = MODELS[kind]
    saved = timm.create_model(name, num_classes=40, **arguments)
    hub.save_model(saved, tmp_path)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=60, ignore_mismatched_sizes=True
    )
    fresh = timm.create_model(name, num_classes=60, **arguments)
    new = []
    for key, value in wrapped.timm_model.state_dict().items():
        if value.shape == saved.state_dict()[key].shape:
            assert torch.equal(value, saved.state_dict()[key]), key
        else:
            new.append(key)
            assert value.std().item() == pytest.approx(fresh.state_dict()[key].std().item(), rel=0.1), key
            assert abs(value.mean().item()) < value.std().item() / 5
    assert new and len({key.split(".")[0] for key in new}) == 1, "only the classifier"

    size = arguments.get("img_size", 32)
    optimizer = torch.optim.SGD(wrapped.parameters(), 1e-3)
    loss = wrapped(torch.rand(2, 3, size, size), labels=torch.tensor([0, 59])).loss
    loss.backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in wrapped.parameters())


@pytest.mark.usefixtures("nan_for_memory_that_is_not_set")
@hooked
def test_transformers_fills_every_layer_that_a_checkpoint_lacks():
    """Not only classifiers: here each kind of layer, its running statistics included, on memory that is not set."""
    guard = pytest.importorskip("transformers.initialization").guard_torch_init_functions
    model = torch.nn.Sequential(
        layers.BcosConv2d(4, 4, 3),
        layers.DAUConv2d(4, 4, 3, rank=2),
        layers.BatchNormUncentered2d(4),
        layers.PositionNorm2d(4),
        layers.DynamicGroupNorm2d(4),
        layers.DynamicLayerNorm(4),
        layers.BcosLinear(4, 4),
        layers.DAULinear(4, 4, rank=2),
    )
    model = model.to("meta").to_empty(device="cpu")
    kept = model[0].weight
    kept.data.fill_(3)
    kept._is_hf_initialized = True
    assert sum(tensor.isnan().all() for tensor in model.state_dict().values()) == len(model.state_dict()) - 1

    assert reinit_non_persistent_buffers(model), "timm calls the same hook on weights that are loaded"
    assert model[2].weight.isnan().all()
    with guard():
        reinit_non_persistent_buffers(model)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert (kept == 3).all(), "a loaded weight is not touched"


@hooked
def test_timms_hook_leaves_trained_weights_alone():
    model = timm_coda.CodaNet(depths=(1, 1, 1), channels=(8, 8, 8), strides=(1, 2, 2), rank=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reinit_non_persistent_buffers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
