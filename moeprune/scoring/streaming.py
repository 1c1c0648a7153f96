"""Run a model's own forward with one layer in memory at a time.

Every batch's forward runs in a greenlet, a function that can be left in its middle and entered again. A hook in front
of each layer leaves it. The scheduler then loads that layer once, lets every waiting batch pass it, drops it and goes
on. Masks, rotary tables and whatever else the model does between its layers stay its own code, so the result is that
of the model in memory, to the bit, and there is no line here about any family of models.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moeprune.checkpoint.folder import Checkpoint
from moeprune.errors import InputError
from moeprune.scoring.building import build, pick_device
from moeprune.scoring.frames import held_by
from moeprune.scoring.loading import OUTSIDE, LayerLoader
from moeprune.scoring.memory import FreedMemory, check_memory, device_limit
from moeprune.scoring.parking import Parking
from moeprune.scoring.resume import SavedState
from moeprune.settings import Settings

Result = TypeVar("Result")
Forward = Callable[[PreTrainedModel], Result]
TOWERS = ("vision", "visual", "audio")  # in the names of the parts that make tokens of images and sounds


class _Left(BaseException):
    """A forward is left for good. Not an Exception, so that nothing in the model takes it for one."""


class Watcher(Protocol):
    """What may look on while layers run; every method may do nothing."""

    def batch_begins(self, batch: int, /) -> None:
        """The scheduler enters this batch's forward."""

    def layer_begins(self, layer: str, /) -> None:
        """A layer is loaded and the batches are about to pass it."""

    def layer_ends(self, layer: str, /) -> None:
        """All batches have passed the layer and it is dropped."""


class LayerStream:
    """A checkpoint's model, ready to run forwards layer by layer."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.device = pick_device(settings)
        self.freed = FreedMemory()
        self.model = build(checkpoint, settings)
        self.layers = find_layers(self.model)
        if not self.layers:
            raise InputError(
                f"{type(self.model).__name__} marks no layers as transformers does, so it cannot be streamed"
            )
        self.order = {name: i for i, name in enumerate(self.layers)}
        self.loader = LayerLoader(self.model, checkpoint, tuple(self.layers), self.device)
        self.reads_ahead = check_memory(self.loader, self.device)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.device)
        spill = settings.output_path / "reap_state"
        self.parking = Parking(self.device, device_limit(self.loader, self.device), settings.hidden_memory, spill)
        self._around = self._around_layers()
        self._saving = False
        self.current = -1  # the batch whose forward runs

    def run(
        self,
        forwards: Sequence[Forward[Result]],
        *,
        watchers: Sequence[Watcher] = (),
        until: str | None = None,
        state: SavedState | None = None,
    ) -> list[Result | None]:
        """Call every forward with the model, layer by layer; their results in order.

        With `until`, each forward is left for good behind that layer and its result is None: what comes later, such as
        the head, is neither loaded nor run. With `state`, finished layers are saved and those of an
        earlier run skipped.
        """
        results: list[Result | None] = [None] * len(forwards)
        self.freed = FreedMemory()  # a run's first layer says how much memory the run takes

        def batch(index: int) -> None:
            with suppress(_Left):
                results[index] = forwards[index](self.model)

        with torch.no_grad(), ExitStack() as stack:
            gc.freeze()  # a collection after each layer need not look at everything that was there before
            stack.callback(gc.unfreeze)
            stack.callback(self.loader.drop, OUTSIDE)
            unused = self._head() if until else ()
            self.loader.load(OUTSIDE, skip=unused)
            self.model.tie_weights()
            self.loader.refuse_empty(skip=unused)
            skipped = self._skipped(state)
            stack.enter_context(self._handing_out(skipped, state))
            stack.enter_context(self._stops(until, skipped, state))
            self._schedule([greenlet(partial(batch, index)) for index in range(len(forwards))], watchers, state)
        return results

    def _schedule(self, batches: Sequence[greenlet], watchers: Sequence[Watcher], state: SavedState | None) -> None:
        """Let all batches reach their next layer, load the earliest one, let those that wait for it pass; repeat."""

        def enter(index: int) -> str:
            self.current = index
            self.parking.unpark(index)
            for watcher in watchers:
                watcher.batch_begins(index)
            stopped = batches[index].switch()
            if stopped is None:
                self.parking.forget(index)
                return ""
            layer, arguments = stopped
            held = held_by(batches[index].gr_frame, self._around) if self._around else ()
            self.parking.park(index, (arguments, list(held)))
            return str(layer)

        waiting = {index: enter(index) for index in range(len(batches))}
        while waiting := {index: at for index, at in waiting.items() if not batches[index].dead}:
            layer = min(waiting.values(), key=self.order.__getitem__)
            self.loader.load(layer)
            self._read_ahead(layer)
            for watcher in watchers:
                watcher.layer_begins(layer)
            self._saving = state is not None and state.begin(layer, self.parking.held)
            for index in [index for index, at in waiting.items() if at == layer]:
                waiting[index] = enter(index)
            self.loader.drop(layer)
            self.freed.layer_done()
            for watcher in watchers:
                watcher.layer_ends(layer)
            if state is not None and self._saving:
                state.commit(layer)

    def _around_layers(self) -> list[Module]:
        """The modules outside of layers, if there is a tower; other models hold nothing that they do not hand over."""
        if not any(word in name for name in self.layers for word in TOWERS):
            return []
        inside = {module for layer in self.layers.values() for module in layer.modules()}
        return [module for module in self.model.modules() if module not in inside]

    def _read_ahead(self, layer: str) -> None:
        following = self.order[layer] + 1
        if self.reads_ahead and following < len(self.layers):
            self.loader.read_ahead(tuple(self.layers)[following])

    @contextmanager
    def _stops(self, until: str | None, skipped: Sequence[str], state: SavedState | None) -> Iterator[None]:
        """Hooks that leave a forward in front of every layer, and for good behind `until`."""
        scheduler = getcurrent()

        def stop(name: str) -> Callable[..., None]:
            def hook(_module: Module, args: Any, kwargs: Any) -> None:  # anything but None would replace the arguments
                scheduler.switch((name, (args, kwargs)))

            return hook

        def keep(_module: Module, _args: Any, output: Any) -> None:
            if state is not None and self._saving:
                state.put(self.current, output)

        def leave(_module: Module, _args: Any, _output: Any) -> None:
            raise _Left

        running = {name: module for name, module in self.layers.items() if name not in skipped}
        hooks = [module.register_forward_pre_hook(stop(name), with_kwargs=True) for name, module in running.items()]
        hooks += [module.register_forward_hook(keep) for module in running.values()]
        if until is not None:
            hooks.append(self.layers[until].register_forward_hook(leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _skipped(self, state: SavedState | None) -> tuple[str, ...]:
        """The layers up to the saved one, of its own stack; a vision tower in front of it runs again."""
        if state is None or state.layer is None:
            return ()
        stack, last = state.layer.rpartition(".")[0], self.order[state.layer]
        return tuple(name for name, i in self.order.items() if i <= last and name.rpartition(".")[0] == stack)

    @contextmanager
    def _handing_out(self, skipped: Sequence[str], state: SavedState | None) -> Iterator[None]:
        """Layers that do not run hand out what the last of them put out in an earlier run."""

        def saved(*_args: Any, **_kwargs: Any) -> Any:
            assert state is not None
            return state.output(self.current, self.device)

        for name in skipped:
            self.layers[name].forward = saved
        try:
            yield
        finally:
            for name in skipped:
                del self.layers[name].forward

    def _head(self) -> tuple[str, ...]:
        """The parameters of the output head, unless they are those of the embedding too."""
        head = self.model.get_output_embeddings()
        tied = getattr(self.model, "all_tied_weights_keys", {})
        names = [name for name, module in self.model.named_modules() if module is head and head is not None]
        own = [f"{names[0]}.{name}" for name, _ in head.named_parameters()] if names else []
        return () if any(name in tied or name in tied.values() for name in own) else tuple(own)


def find_layers(model: PreTrainedModel) -> dict[str, Module]:
    """Every decoder, encoder and tower layer in the order in which they run; outermost ones only.

    Models list their parts in any order. Images and sounds are seen before the text that they stand in is read: texts
    must wait for them, or the text layers would be passed twice.
    """
    unsplit = set(model._no_split_modules or ())
    layers: dict[str, Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(layer + ".") for layer in layers)
        numbered = name.rpartition(".")[2].isdigit() and type(module).__name__ in unsplit
        if (isinstance(module, GradientCheckpointingLayer) or numbered) and not inside:
            layers[name] = module
    towers = [name for name in layers if any(word in name for word in TOWERS)]
    return {name: layers[name] for name in [*towers, *layers]}
