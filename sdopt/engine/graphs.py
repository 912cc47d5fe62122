"""CUDA graphs of a module's calls, one a shape: captured at the shape's first call, the least recently used forgotten first.

A graph is a list of kernels with all their addresses, started as one. It is right as long as what lies at these addresses is
what the module would read, so a module is looked at again before each picture (`state`), and its graphs are forgotten when its
weights have moved. Weights that change where they are need no new graph.
"""

import threading
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from copy import deepcopy
from functools import update_wrapper
from weakref import WeakSet

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from sdopt.engine import state
from sdopt.errors import UserError
from sdopt.kernels import launch

PATIENCE = 2  # captures in a row, before a decoder whose weights move again and again is left as it is


def can_capture(module) -> bool:
    """Whether the module is on a device that has graphs."""
    return next(module.parameters()).is_cuda


def check_current(module):
    """Raise UserError if the module is on another GPU than the current one, where kernels and captures would start."""
    device = next(module.parameters()).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        other = f"the model is on GPU {device.index}, which is not the current one"
        raise UserError(f"{other}: call torch.cuda.set_device({device.index}) first")


class Memory:
    """What the graphs of one pipeline share: the stream they are captured on, and the pool that their memory comes from.

    `lock`: held from a graph's inputs to a copy of its outputs, and over captures, since another thread may use the pool.
    `end`: of what was started `beside`, if anything was.
    """

    end = None

    def __init__(self):
        self.stream = self.handle = None
        self.lock = threading.RLock()
        self.graphs = WeakSet()

    def __deepcopy__(self, memo):
        return Memory()

    def pool(self):
        if not self.graphs:  # a pool whose last graph is gone cannot be taken up again
            self.handle = torch.cuda.graph_pool_handle()
        return self.handle


def capture(call, memory: Memory):
    """`call()` as a CUDA graph in the pool of `memory`: (a function that replays it, what it returns at each replay).

    What is returned lies in the pool, at the same place each time, where another graph of the pool may write: copy it
    before the next replay of any. What `call` reads has to be kept alive by the caller. `call` runs twice before: with our
    kernels compiled and not started, then for whatever else is set up at a first call (algorithms tried); on the same
    stream, since cuBLAS keeps some 32 MiB for every stream it has seen. Introduced in notebooks/12_cuda_graphs.
    """
    memory.stream = memory.stream or torch.cuda.Stream()
    memory.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(memory.stream):
        launch.compile_ahead(call)
        call()
    torch.cuda.current_stream().wait_stream(memory.stream)
    graph = torch.cuda.CUDAGraph()
    # another thread may allocate meanwhile
    with torch.cuda.graph(graph, pool=memory.pool(), stream=memory.stream, capture_error_mode="thread_local"):
        output = call()
    memory.graphs.add(graph)
    return graph.replay, output


def mark(module):
    """What the GPU of `module` has been given to do so far, for `beside`; None on a CPU, which does one thing after another."""
    return torch.cuda.current_stream().record_event() if next(module.parameters()).is_cuda else None


@contextmanager
def beside(memory: Memory, mark):
    """What is started within goes on beside what was started after `mark`, until `join`: graphs of `memory`, which no other has."""
    memory.stream = memory.stream or torch.cuda.Stream()
    memory.stream.wait_event(mark)
    with torch.cuda.stream(memory.stream):
        try:
            yield
        finally:
            memory.end = memory.stream.record_event()


def join(memory: Memory):
    """Let what is started from now on wait for what was started `beside`."""
    if memory.end is not None:
        torch.cuda.current_stream().wait_event(memory.end)


def copied(output):
    """`output`, tensors in whatever structure, with tensors of its own: where all are of one dtype by one kernel, or few."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    copies = list(map(torch.empty_like, tensors))
    if tensors:
        torch._foreach_copy_(copies, tensors)
    following = iter(copies)
    return tree_map_only(torch.Tensor, lambda _: next(following), output)


def waits(call):
    """Why `call()` cannot be captured, if the CPU waits for the GPU in it, or None.

    Introduced in notebooks/12_cuda_graphs.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return "it waits for the GPU in the middle"
    finally:
        torch.cuda.set_sync_debug_mode(before)


def place(tensor, device):
    """A tensor of its own for `tensor`'s values, where a graph will look for them; images in channels_last memory."""
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return torch.empty_like(tensor, device=device, memory_format=layout).copy_(tensor)


def put(places, tensors):
    """Copy `tensors` to their `places`: two dicts, of which the second may hold fewer."""
    for name, tensor in tensors.items():
        places[name].copy_(tensor)


def shapes(tensors):
    """What one graph is for: a key that two dicts of tensors share if one graph can serve both.

    Introduced in notebooks/12_cuda_graphs.
    """
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items())


class Captured:
    """A module's `forward` by graphs: what `Decoder` and `unet.UNet` share. `memory`: what all their graphs share.

    Introduced in notebooks/12_cuda_graphs.
    """

    def __init__(self, module, memory, limit):
        self.module, self.memory, self.limit = module, memory, limit
        self.entries, self.said = OrderedDict(), set()
        self.seen = self.reason = None
        update_wrapper(self, type(module).forward)  # pipelines look at its signature

    def __deepcopy__(self, memo):
        """For a copy of the module: without graphs, which read the original's weights."""
        return type(self)(deepcopy(self.module, memo), deepcopy(self.memory, memo), self.limit)

    def look(self):
        """See whether the module is what it was; if not, forget its graphs, and ask whether it can be captured at all."""
        seen = state.fingerprint(self.module)
        if seen != self.seen:
            self.entries.clear()
            check_current(self.module)
            self.seen, self.reason = seen, state.why_not(self.module)
            self.device_type = next(self.module.parameters()).device.type
            if not can_capture(self.module):
                self.reason = "its weights are not on a GPU"
            return True
        return False

    def obstacle(self):
        """Why this call has to run eagerly, as far as the module and PyTorch's state can tell, or None."""
        if torch.is_autocast_enabled(self.device_type):  # which casts what it is given, operation by operation
            return self.reason or "autocast is on"
        return self.reason or ("gradients are on" if torch.is_grad_enabled() else None)

    def entry(self, key, make):
        """The entry for `key`, made by `make()` where there is none, the least recently used going first."""
        if key in self.entries:
            self.entries.move_to_end(key)
        else:
            while len(self.entries) >= self.limit:
                self.entries.popitem(last=False)
            check_current(self.module)
            # inference mode's tensors cannot be written to outside it, where the next picture may be drawn
            with torch.inference_mode(False), torch.no_grad():
                self.entries[key] = make()
        return self.entries[key]

    def of_one(self, tensor, **asked):
        """What the module's own forward returns for one tensor and the settings `asked`, by a graph, in tensors of its own."""

        def make():
            input = place(tensor, tensor.device)
            return input, *capture(lambda: type(self.module).forward(self.module, input, **asked), self.memory)

        key = (shapes({"input": tensor}), *sorted(asked.items()))
        with self.memory.lock:
            input, replay, output = self.entry(key, make)
            input.copy_(tensor)
            replay()
            return copied(output)

    def eagerly(self, reason, *args, **kwargs):
        """The module's own forward; says once why."""
        if reason not in self.said:
            self.said.add(reason)
            warnings.warn(f"the engine runs {type(self.module).__name__} eagerly: {reason}", stacklevel=4)
        return type(self.module).forward(self.module, *args, **kwargs)


class Decoder(Captured):
    """A VAE's decoder: latents in, an image out."""

    moves = 0  # calls in a row before which its weights have moved

    def __call__(self, sample, *args, **kwargs):
        self.moves = self.moves + 1 if self.look() else 0
        reason = self.obstacle()
        if any(value is not None for value in (*args, *kwargs.values())):
            reason = "it was called with more than latents"
        elif self.moves > PATIENCE:
            reason = (
                "its weights move before every picture (upcast, or offloaded), and a capture takes longer than it gains"
            )
        if reason:
            return self.eagerly(reason, sample, *args, **kwargs)
        return self.of_one(sample)
