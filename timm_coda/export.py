"""Export models to files that run without this package: torch.export programs (.pt2) and ONNX.

With `explain=True` the file also computes the explanation: the backward pass of `explanation_mode` is written out as a
graph, so that running it needs neither autograd nor Python. The code uses the same few attributes of a model as
`explain`, and does not depend on its layers.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from .explanation import Classes, explanation_mode
from .hub import __version__, replacing
from .layers import use_backend

__all__ = ["FORMATS", "OPSET", "export_model", "export_program", "largest_differences", "metadata"]

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
OPSET = 18  # the version that PyTorch's exporter writes without converting
OUTPUTS: tuple[str, ...] = ("logits", "contributions", "weights")  # all with an explanation, else only the first
PREDICTION = -1  # target value for the class with the largest logit


class _Classifier(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(image)}


class _Explainer(nn.Module):
    """Explanation graph, with the weights of the model from which it was traced."""

    def __init__(self, model: nn.Module, graph: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graph = graph

    def forward(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        outputs = self.graph(self.model.state_dict(keep_vars=True), image, target)
        return dict(zip(OUTPUTS, outputs, strict=True))


def export_program(
    model: nn.Module, *, explain: bool = False, img_size: int | tuple[int, int] | None = None
) -> torch.export.ExportedProgram:
    """Export a model as a graph of PyTorch's own operators, in float32 on the CPU, for any batch size.

    Inputs are `image` (B, C, H, W), colours in [0, 1] (the model's own input), and with `explain` also `target` (B,),
    int64, the class to explain, or -1 for the prediction, one for each image: any other number of targets is an error.

    Args:
        model: not modified. Other dtypes are exported in float32, because few runtimes support bfloat16 convolutions.
        explain: include the explanation
        img_size: height and width, which are fixed in the file (default: the model's)

    Returns:
        A program that returns a dictionary of `logits` (B, classes), and with `explain` also `contributions`
        (B, H, W), which sum to the target's logit - bias, and `weights` (B, 2C, H, W), the dynamic linear map. A target
        that is not a class gives NaN in both, because a graph cannot raise.

    Raises:
        ValueError: `img_size` is below 1, or with `explain`, the model cannot explain itself.
    """
    size, images = _image_size(model, img_size)
    model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
    example = torch.zeros(2, images, *size)  # 2, because a graph traced with one image accepts only one
    batch = {0: torch.export.Dim("batch")}
    with use_backend("torch"):
        if not explain:
            return torch.export.export(_Classifier(model), (example,), dynamic_shapes={"image": batch}, strict=False)
        target = torch.full((2,), PREDICTION)
        graph = _explanation_graph(model, example, target)
    shapes = {"image": batch, "target": batch}
    return torch.export.export(_Explainer(model, graph), (example, target), dynamic_shapes=shapes, strict=False)


def export_model(
    model: nn.Module, path: str | os.PathLike, *, explain: bool = False, img_size: int | tuple[int, int] | None = None
) -> Path:
    """Write the program of `export_program` to a file atomically, with `metadata` inside.

    A .pt2 file is for `torch.export.load`, AOTInductor and ExecuTorch, with the metadata in the extra file
    metadata.json. An .onnx file, in opset 18, is for ONNX Runtime and others, with the metadata in metadata_props.

    Args:
        model, explain, img_size: as in `export_program`
        path: must end in .onnx or .pt2, which selects the format

    Returns:
        The path.

    Raises:
        ValueError: the path has another suffix, or an error of `export_program`.
        ImportError: the export extra, which ONNX needs, is not installed.
        OSError: the folder does not exist, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS.values():
        raise ValueError(f"{path}: must end in {' or '.join(FORMATS.values())}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder: create it first")
    program = export_program(model, explain=explain, img_size=img_size)
    about = metadata(model, explain=explain, img_size=img_size)
    with replacing(path) as stream:
        if path.suffix == FORMATS["torch"]:
            torch.export.save(program, stream, extra_files={"metadata.json": json.dumps(about)})
        else:
            _save_onnx(program, Path(stream.name), about)
    return path


def _save_onnx(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    try:
        import onnxscript  # noqa: F401  # PyTorch's exporter needs it
    except ImportError as error:
        raise ImportError("ONNX needs onnx and onnxscript: pip install 'timm_coda[export]'") from error
    inputs = ["image", "target"][: len(program.graph_signature.user_inputs)]
    outputs = list(OUTPUTS if about["explain"] else OUTPUTS[:1])
    batch = {name: {0: "batch"} if name == "image" else None for name in inputs}  # names the axis that both share
    converted = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=batch,
        verbose=False,
    )
    assert converted is not None  # it is None only without dynamo=True
    converted.model.metadata_props.update({key: v if isinstance(v, str) else json.dumps(v) for key, v in about.items()})
    converted.save(path, external_data=False)


def metadata(model: Any, *, explain: bool = False, img_size: int | tuple[int, int] | None = None) -> dict[str, Any]:
    """Return what a service needs to know about an exported model, as JSON values.

    This is the input size and transform, the class names, the license and, with `explain`, the bias.

    Raises:
        ValueError: `img_size` is below 1.
    """
    config, published = resolve_model_data_config(model), getattr(model, "pretrained_cfg", {})
    size, channels = _image_size(model, img_size)
    return {
        "architecture": published.get("architecture") or type(model).__name__,
        "timm_coda": __version__,
        "explain": explain,
        "input_size": [channels, *size],
        "mean": list(config["mean"])[:channels],
        "std": list(config["std"])[:channels],
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "num_classes": model.num_classes,
        "label_names": list(Classes.of(model).labels),
        "license": published.get("license") or "",
        **({"bias": model.logits.bias} if explain else {}),
    }


def largest_differences(
    path: str | os.PathLike, model: nn.Module, *, count: int = 3, seed: int = 0
) -> dict[str, float]:
    """Compare an exported file with `model`, in float32, on random images.

    Two batches are compared, `count` images and one image; explanations for the prediction and for random classes.

    Returns:
        The largest |file - model| / |model| of each output; infinite for NaN.

    Raises:
        ImportError: the export extra, which ONNX needs, is not installed.
    """
    run, about = _load(Path(path))
    model = copy.deepcopy(model).float().cpu().eval()
    generator = torch.Generator().manual_seed(seed)
    found = dict.fromkeys(OUTPUTS if about["explain"] else OUTPUTS[:1], 0.0)
    for batch in (count, 1):
        images = torch.rand(batch, *about["input_size"], generator=generator)
        if not about["explain"]:
            with torch.no_grad():
                pairs = [({"image": images}, {"logits": model(images)})]
        else:
            pairs = []
            classes = torch.randint(about["num_classes"], (batch,), generator=generator)
            for target, given in ((None, torch.full((batch,), PREDICTION)), (classes, classes)):
                e = model.explain(images, target)  # pyright: ignore[reportCallIssue]
                expected = {name: getattr(e, name) for name in found}
                pairs.append(({"image": images, "target": given}, expected))
        for inputs, expected in pairs:
            outputs = run(inputs)
            for name, right in expected.items():
                difference = ((outputs[name] - right).norm() / right.norm()).item()
                found[name] = max(found[name], inf if isnan(difference) else difference)
    return found


def _load(path: Path) -> tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, Any]]:
    """Return a function from named inputs to named outputs, and the metadata."""
    if path.suffix == FORMATS["torch"]:
        extra = {"metadata.json": ""}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # PyTorch 2.9 reads weights so
            module = torch.export.load(path, extra_files=extra).module()
        return lambda inputs: module(*inputs.values()), json.loads(extra["metadata.json"])
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("running ONNX needs onnxruntime: pip install 'timm_coda[export]'") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    written = session.get_modelmeta().custom_metadata_map

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}

    return run, {name: json.loads(written[name]) for name in ("explain", "input_size", "num_classes")}


def _image_size(model: Any, img_size: int | tuple[int, int] | None) -> tuple[tuple[int, int], int]:
    """Return (height, width) and the number of colour channels."""
    channels, *size = resolve_model_data_config(model)["input_size"]
    channels = getattr(model, "in_chans", channels)  # the actual number; the configuration may still say 3
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(size) < 1:
        raise ValueError(f"img_size={img_size}: must be at least 1")
    return (size[0], size[1]), channels


def _explanation_graph(model: Any, image: Tensor, target: Tensor) -> torch.fx.GraphModule:
    """Trace (model state, image, target) to logits, contributions and weights, with backward as plain operators."""
    if not getattr(model, "num_classes", 0) or not getattr(getattr(model, "global_pool", None), "pool_type", "sum"):
        raise ValueError("this model has no pooled classifier to explain: give it one with reset_classifier()")

    def explain(state: dict[str, Tensor], image: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad(), explanation_mode(model):
            encoded = model.encoding(image).detach().requires_grad_()
            logits = torch.func.functional_call(model, state, (encoded,))
        # Joined, because runtimes refuse to join another number of targets than of images; `where` would repeat one.
        predicted, given = torch.cat([logits.argmax(1, keepdim=True), target[:, None]], 1).unbind(1)
        chosen = torch.where(given == PREDICTION, predicted, given)
        seed = (chosen[:, None] == torch.arange(logits.shape[1])).to(logits.dtype)
        seed = seed / seed.sum(1, keepdim=True)  # one-hot; 0/0 = NaN where the target is not a class
        (weights,) = torch.autograd.grad(logits, encoded, seed)
        return logits.detach(), (weights * encoded.detach()).sum(1), weights

    # The batch size gets its own symbol: without duck_shape=False, any other size of 2 would share it.
    fake = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    state = {name: fake.from_tensor(tensor, static_shapes=True) for name, tensor in model.state_dict().items()}
    inputs = []
    for tensor in (image, target):
        dynamic = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (tensor.dim() - 1)
        inputs.append(fake.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic)))
    table = {
        torch.ops.aten.convolution_backward.default: _convolution_backward,
        torch.ops.aten.avg_pool2d_backward.default: _avg_pool2d_backward,
    }
    with fake:
        return make_fx(explain, decomposition_table=table)(state, *inputs)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, None, None]:
    """Compute the input gradient as a transposed convolution, which runtimes support; weights are constants here."""
    if transposed or output_mask != [True, False, False]:
        return NotImplemented
    rest = _unreached(x, weight, stride, padding, dilation)
    data = torch.ops.aten.convolution.default(grad, weight, None, stride, padding, dilation, True, rest, groups)
    return data, None, None


def _avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """Compute the gradient as a transposed convolution of each channel, with equal weights."""
    if ceil_mode or not count_include_pad or divisor is not None:
        return NotImplemented
    channels, stride = x.shape[1], stride or kernel
    weight = torch.full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]), dtype=grad.dtype)
    rest = _unreached(x, weight, stride, padding, [1, 1])
    return torch.ops.aten.convolution.default(grad, weight, None, stride, padding, [1, 1], True, rest, channels)


def _unreached(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    """Return the number of pixels at the end of each axis that no kernel window covers."""
    seen = [dilation[axis] * (weight.shape[2 + axis] - 1) + 1 for axis in range(len(stride))]
    return [(x.shape[2 + i] + 2 * padding[i] - seen[i]) % stride[i] for i in range(len(stride))]
