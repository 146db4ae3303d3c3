"""Weight updates: clip gradients, and skip updates whose gradient is not finite. On a GPU, replay them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from tqdm import tqdm

__all__ = ["RecordedUpdates", "Updates", "can_record", "limit_gradients"]


def limit_gradients(accelerator: Any, model: nn.Module, norm: float, adaptive: float) -> None:
    """Clip gradients in place, unless they are still being accumulated.

    Args:
        accelerator: Accelerate's, which knows whether gradients are being accumulated
        model: the model whose gradients are clipped
        norm: largest norm of the whole gradient; 0: no limit
        adaptive: largest norm of a unit's gradient, relative to the norm of its weights; 0: no limit. Source: Brock et
            al., ICML 2021 (arXiv 2102.06171), as in timm
    """
    if not accelerator.sync_gradients:
        return
    if norm:
        accelerator.clip_grad_norm_(model.parameters(), norm)
    if adaptive:
        accelerator.unscale_gradients()
        with torch.no_grad():
            adaptive_clip_grad([weight for weight in model.parameters() if weight.grad is not None], adaptive)


class Updates:
    """Update a network's weights, but skip updates whose gradient is not finite: they would ruin the weights.

    All processes skip the same updates, because gradients are averaged over processes first. A skipped update also
    restores the buffers (running variances) to their values after the last update that was made.

    Args:
        accelerator: Accelerate's, which knows whether gradients are being accumulated
        model, optimizer: as returned by `accelerator.prepare`
        compute: runs the model on a batch and `accelerator.backward` on the loss
        norm, adaptive: as in `limit_gradients`
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any,
        compute: Callable[..., None],
        *,
        norm: float,
        adaptive: float,
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.compute = accelerator, model, optimizer, compute
        self.norm, self.adaptive = norm, adaptive
        self._buffers = [buffer.clone() for buffer in model.buffers()]
        self._finite = torch.ones((), dtype=torch.bool, device=accelerator.device)  # the gradient

    def step(self, *batch: Any) -> bool:
        """Compute gradients of a batch, and update the weights unless gradients are still being accumulated.

        Return False if the update was skipped.
        """
        self._gradients(*batch)
        return self._update() if self.accelerator.sync_gradients else True

    def _gradients(self, *batch: Any) -> None:
        """Compute gradients, limit them, and note whether they are finite."""
        self.compute(*batch)
        if not self.accelerator.sync_gradients:
            return
        limit_gradients(self.accelerator, self.model, self.norm, self.adaptive)
        if self.accelerator.scaler is None:
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            self._finite.copy_(nn.utils.get_total_norm(gradients).isfinite())

    @torch.no_grad()
    def _update(self) -> bool:
        """Change the weights by their gradients, or restore the buffers; return whether it was the first."""
        if self.accelerator.scaler is None:
            made = bool(self._finite)
            if made:
                self._change()
        else:  # float16: the scaler checks gradients, and also skips updates while it adjusts its scale
            self.optimizer.step()
            made = not self.optimizer.step_was_skipped
            if made:
                self._keep_buffers()
        if not made:
            for buffer, good in zip(self.model.buffers(), self._buffers, strict=True):
                buffer.copy_(good)
        self.optimizer.zero_grad()
        return made

    def _change(self) -> None:
        self.optimizer.step()
        self._keep_buffers()

    def _keep_buffers(self) -> None:
        for buffer, good in zip(self.model.buffers(), self._buffers, strict=True):
            good.copy_(buffer)


def can_record(accelerator: Any) -> bool:
    """Return whether updates can be replayed: on one GPU, without accumulation, and not in float16.

    float16 asks the CPU after every update how to scale the next loss.
    """
    one = accelerator.num_processes == 1 and accelerator.gradient_accumulation_steps == 1
    return one and accelerator.device.type == "cuda" and accelerator.scaler is None


class RecordedUpdates(Updates):
    """Updates that a GPU replays from two CUDA graphs, gradients and weights, without waiting for Python.

    The first updates are made as usual, because kernels are compiled and chosen then; the next is recorded, and from
    then on replayed, except for batches of another size. Between the two graphs, one number comes back from the GPU:
    whether the gradient is finite. Deciding that on the GPU would need copies of all weights and of the optimiser's
    state, which take it longer than this wait. If recording fails, for example because a layer asks the GPU for a
    number, updates go on as usual, and a message says so.

    Args:
        accelerator, model, optimizer, compute, norm, adaptive: as in `Updates`; `compute` must do the same work for all
            batches of a size. The optimiser is recorded only if it is `capturable`
    """

    FIRST = 3  # updates before recording

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stream = torch.cuda.Stream() if self.accelerator.device.type == "cuda" else None
        self._kinds, self._alike = [], 0  # of the latest batch, and how many before it were alike
        self._tried, self._replayed = False, False  # to record; the latest gradients
        self._graphs: list[Any] = []  # of gradients and, if that could be recorded, of weights
        self._recorded: list[Any] = []  # kinds
        # What the graphs read and write: batch, gradients, learning rates.
        self._batch: list[Any] = []
        self._written: list[tuple[nn.Parameter, Tensor | None]] = []
        self._rates: list[Tensor] = []

    def step(self, *batch: Any) -> bool:
        """See `Updates.step`."""
        # Shapes and dtypes of tensors, and other values, are the same whenever a graph is replayed.
        kinds = [(value.shape, value.dtype) if isinstance(value, Tensor) else value for value in batch]
        self._alike = self._alike + 1 if kinds == self._kinds else 0
        self._kinds = kinds
        if not self._tried and self._alike == self.FIRST:
            self._record(batch)
            self._tried, self._recorded = True, kinds
        self._replayed = bool(self._graphs) and kinds == self._recorded
        with contextlib.nullcontext() if self._tried else self._beside():
            return super().step(*batch)

    def _gradients(self, *batch: Any) -> None:
        if not self._replayed:
            super()._gradients(*batch)
            return
        for kept, given in zip(self._batch, batch, strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(given)
        self._graphs[0].replay()
        for weight, gradient in self._written:
            weight.grad = gradient

    def _change(self) -> None:
        if not self._replayed or len(self._graphs) == 1:
            super()._change()
            return
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._graphs[1].replay()

    def _record(self, batch: Any) -> None:
        device, groups = self.accelerator.device, self.optimizer.param_groups
        self._batch = [value.clone() if isinstance(value, Tensor) else value for value in batch]
        numbers, graphs = [group["lr"] for group in groups], self._graphs
        try:
            graphs.append(record(lambda: super(RecordedUpdates, self)._gradients(*self._batch), self._stream))
            self._written = [(weight, weight.grad) for weight in self.model.parameters()]
            if all(group.get("capturable") for group in groups):
                self._rates = [torch.tensor(float(number), device=device) for number in numbers]
                for group, rate in zip(groups, self._rates, strict=True):
                    group["lr"] = rate
                graphs.append(record(super()._change, self._stream, graphs[0]))
        except RuntimeError as error:
            tqdm.write(f"note: updates are not replayed as CUDA graphs, which is slower: {error}")
            graphs.clear()
        for group, number in zip(groups, numbers, strict=True):
            group["lr"] = number
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Run on the stream that will be recorded, as PyTorch's notes on CUDA graphs ask for."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)


def record(run: Callable[[], None], stream: Any, before: Any = None) -> Any:
    """Record the GPU's work of a function, without doing it; `before` is a graph that is replayed just before it."""
    graph = torch.cuda.CUDAGraph()
    options: Any = {"stream": stream, "pool": None if before is None else before.pool()}
    # The outer context restores the stream if recording fails. Threads of data loaders may ask for memory meanwhile.
    outer = torch.cuda.stream(torch.cuda.current_stream())
    with outer, torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
        run()
    return graph
