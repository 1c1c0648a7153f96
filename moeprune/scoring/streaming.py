"""Run a model's own forward with one layer in memory at a time.

Every batch's forward runs in a greenlet, a function that can be left in its middle and entered again. A hook in front of
each layer leaves it. The scheduler then loads that layer once, lets every waiting batch pass it, drops it and goes on.
Masks, rotary tables and whatever else the model does between its layers stay its own code, so the result is that of the
model in memory, to the bit, and there is no line here about any family of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moeprune.checkpoint.folder import Checkpoint
from moeprune.errors import InputError
from moeprune.scoring.building import build, pick_device
from moeprune.scoring.loading import OUTSIDE, LayerLoader
from moeprune.settings import Settings

Result = TypeVar("Result")
Forward = Callable[[PreTrainedModel], Result]


class Watcher(Protocol):
    """What may look on while layers run; every method may do nothing."""

    def batch_begins(self, batch: int) -> None:
        """The scheduler enters this batch's forward."""

    def layer_begins(self, layer: str) -> None:
        """A layer is loaded and the batches are about to pass it."""

    def layer_ends(self, layer: str) -> None:
        """All batches have passed the layer and it is dropped."""


class LayerStream:
    """A checkpoint's model, ready to run forwards layer by layer."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.device = pick_device(settings)
        self.model = build(checkpoint, settings)
        self.layers = find_layers(self.model)
        if not self.layers:
            raise InputError(
                f"{type(self.model).__name__} has no layers that transformers marks as such; cannot stream it"
            )
        self.order = {name: i for i, name in enumerate(self.layers)}
        self.loader = LayerLoader(self.model, checkpoint, tuple(self.layers), self.device)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.device)

    def run(
        self, forwards: Sequence[Forward[Result]], *, watchers: Sequence[Watcher] = (), until: str | None = None
    ) -> list[Result | None]:
        """Call every forward with the model, layer by layer; their results in order.

        With `until`, each forward is left for good behind that layer and its result is None: what comes later, such as
        the head, is neither loaded nor run.
        """
        results: list[Result | None] = [None] * len(forwards)

        def batch(index: int) -> None:
            results[index] = forwards[index](self.model)

        with torch.no_grad(), ExitStack() as stack:
            stack.callback(self.loader.drop, OUTSIDE)
            self.loader.load(OUTSIDE, skip=self._head() if until else ())
            self.model.tie_weights()
            stack.enter_context(self._stops(until))
            self._schedule([greenlet(lambda i=i: batch(i)) for i in range(len(forwards))], watchers)
        return results

    def _schedule(self, batches: Sequence[greenlet], watchers: Sequence[Watcher]) -> None:
        """Let all batches reach their next layer, load the earliest one, let those that wait for it pass; repeat."""

        def enter(index: int) -> str:
            for watcher in watchers:
                watcher.batch_begins(index)
            return batches[index].switch()  # type: ignore[no-any-return]

        waiting = {index: enter(index) for index in range(len(batches))}
        while waiting := {index: at for index, at in waiting.items() if not batches[index].dead}:
            layer = min(waiting.values(), key=self.order.__getitem__)
            self.loader.load(layer)
            self._read_ahead(layer)
            for watcher in watchers:
                watcher.layer_begins(layer)
            for index in [index for index, at in waiting.items() if at == layer]:
                waiting[index] = enter(index)
            self.loader.drop(layer)
            for watcher in watchers:
                watcher.layer_ends(layer)

    def _read_ahead(self, layer: str) -> None:
        following = self.order[layer] + 1
        if following < len(self.layers):
            self.loader.read_ahead(tuple(self.layers)[following])

    @contextmanager
    def _stops(self, until: str | None) -> Iterator[None]:
        """Hooks that leave a forward in front of every layer, and for good behind `until`."""
        scheduler = getcurrent()

        def stop(name: str) -> Callable[..., None]:
            def hook(_module: torch.nn.Module, _args: Any) -> None:  # anything but None would replace the arguments
                scheduler.switch(name)

            return hook

        def leave(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
            raise GreenletExit

        hooks = [module.register_forward_pre_hook(stop(name)) for name, module in self.layers.items()]
        if until is not None:
            hooks.append(self.layers[until].register_forward_hook(leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _head(self) -> tuple[str, ...]:
        """The parameters of the output head, unless they are those of the embedding too."""
        head = self.model.get_output_embeddings()
        tied = getattr(self.model, "all_tied_weights_keys", {})
        names = [name for name, module in self.model.named_modules() if module is head and head is not None]
        own = [f"{names[0]}.{name}" for name, _ in head.named_parameters()] if names else []
        return () if any(name in tied or name in tied.values() for name in own) else tuple(own)


def find_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Every decoder, encoder and vision layer in the order of the model; outermost ones only."""
    layers: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(layer + ".") for layer in layers)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            layers[name] = module
    return layers
