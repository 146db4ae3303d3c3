"""CoDA-Nets: the authors' numbers, published sizes, arguments, compiled and exported models, timm's suite."""

import pytest
import timm
import torch

import golden
import timm_coda
from helpers import relative_error
from helpers.timm_suite import run_timm_suite
from timm_coda.models import coda_net

MODELS = ["coda_net_xs", "coda_net_s", "coda_net_m", "coda_net_l"]
TINY = {"depths": (1, 1, 1), "channels": (4, 6, 6), "strides": (1, 2, 2), "rank": 3}


@pytest.mark.parametrize("case", golden.CODA_NETS)
def test_equals_the_authors_numbers(case):
    name, arguments = golden.CODA_NETS[case]
    model = timm.create_model(name, **arguments).double().eval()
    model.load_state_dict(coda_net.checkpoint_filter_fn(golden.state_dict(case), model))
    explanation = model.explain(golden.inputs(case), golden.targets(case))
    bias = model.logits.bias
    assert relative_error(explanation.logits - bias, golden.logits(case) - bias) < 1e-9
    assert golden.error(case, "contributions", explanation.contributions) < 1e-9
    assert golden.error(case, "weights", explanation.weights[:1, :1]) < 1e-9


@pytest.mark.parametrize(("name", "count"), [("coda_net_s", 7_782_816), ("coda_net_l", 47_517_408)])
def test_published_parameter_counts(name, count):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == count


@pytest.mark.parametrize("ranks", [((4, 8), 1.08), ((8, 16), 2.03), ((16, 32), 3.95), ((144, 288), 34.6)])
def test_published_rank_ablation(ranks):
    (first, others), millions = ranks
    model = timm.create_model("coda_net_s", rank=[first] * 2 + [others] * 7, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005 * millions)


def test_registered_with_a_tag_for_every_data_set():
    assert timm.list_models("coda_net*") == sorted(MODELS)
    for name, config in coda_net.default_cfgs.items():
        for tag in config.tags:
            model = timm.create_model(f"{name}.{tag}", device="meta")
            assert model.num_classes == model.pretrained_cfg["num_classes"]
            assert model.pretrained_cfg["mean"] == (0, 0, 0)
            assert model.pretrained_cfg["std"] == (1, 1, 1)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (13, 22)])
def test_any_classes_channels_and_size(in_chans, size):
    model = timm.create_model("coda_net_xs", num_classes=7, in_chans=in_chans, rank=2).eval()
    x = torch.rand(2, in_chans, *size)
    assert model(x).shape == (2, 7)
    explanation = model.explain(x)
    assert explanation.weights.shape == (2, 2 * in_chans, *size)
    assert explanation.contributions.shape == (2, *size)
    assert explanation.residual.abs().max() < 1e-5


def test_arguments_reach_the_network():
    model = timm.create_model("coda_net_xs", rank=5, logit_temperature=3.0, logit_bias=0.0, activation="l2")
    assert {m.rank for m in model.modules() if isinstance(m, timm_coda.DAUConv2d)} == {5}
    assert {m.activation for m in model.modules() if isinstance(m, timm_coda.DAUConv2d)} == {"l2"}
    assert (model.logits.temperature, model.logits.bias) == (3, 0), "0 is a bias, not a missing one"
    x = torch.rand(1, 3, 8, 8)
    warm = timm.create_model("coda_net_xs", rank=5, logit_temperature=6.0, logit_bias=0.0, activation="l2")
    warm.load_state_dict(model.state_dict())
    assert relative_error(2 * warm(x), model(x)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": (3, 3)}, r"3 layers .* got 3, 3 and 2"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"logit_temperature": -1}, "logit_temperature=-1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm_coda.CodaNet(**TINY | arguments)
    with pytest.raises(TypeError):
        timm.create_model("coda_net_xs", temprature=3)


def test_images_smaller_than_the_stride():
    model = timm_coda.CodaNet(**TINY)
    assert model(torch.rand(1, 3, 4, 4)).shape == (1, 10)
    with pytest.raises(ValueError, match="3x4 pixels is smaller than the network's stride: resize it to at least 4x4"):
        model(torch.rand(1, 3, 3, 4))


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_checkpointing_changes_nothing(channels_last):
    torch.manual_seed(0)
    model = timm_coda.CodaNet(**TINY).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    gradients, maps = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
        maps.append(model.explain(x).weights)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
    assert torch.equal(*maps)


def test_compiled_model_follows_explanation_mode():
    """Compiled code must follow the switch, on and off."""
    torch.manual_seed(0)
    model = timm_coda.CodaNet(**TINY).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64).requires_grad_()

    def gradient(run):
        return torch.autograd.grad(run(x)[:, 0].sum(), x)[0]

    free = gradient(model)
    with timm_coda.explanation_mode(model):
        frozen = gradient(model)
    assert relative_error(frozen, free) > 0.1
    assert relative_error(gradient(compiled), free) < 1e-12
    with timm_coda.explanation_mode(compiled):
        assert relative_error(gradient(compiled), frozen) < 1e-12
    assert relative_error(gradient(compiled), free) < 1e-12


def test_export_and_state_dict():
    torch.manual_seed(0)
    model = timm_coda.CodaNet(**TINY).eval()
    x = torch.rand(2, 3, 8, 8)
    exported = torch.export.export(model, (x,))
    assert relative_error(exported.module()(x), model(x)) < 1e-6
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert model.state_dict()["stages.0.0.up.bias"].shape == (4, 6, 3, 3)


@pytest.mark.parametrize("name", ["coda_net_xs", "bcos_v1_conv9"])
def test_a_second_backbone_is_as_the_first(name):
    """timm removes keys from the feature_cfg that it receives."""
    first, second = (timm.create_model(name, features_only=True) for _ in range(2))
    assert type(first) is type(second)
    assert first.feature_info.channels() == second.feature_info.channels()


@pytest.mark.parametrize("models", ["coda_net_*s", pytest.param("coda_net_[ml]", marks=pytest.mark.slow)])
def test_timm_suite(models):
    """timm's own tests, unchanged, except those that would download the authors' weights."""
    run_timm_suite(models, "-k", "not (mpi_t and pretrained)")
