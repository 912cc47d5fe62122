"""Two questions that diffusers asks of all modules of a model several times a picture, and sooner answers.

Whether a model is offloaded in groups is known to a registry on one of its modules, `_diffusers_hook`; and on which device it will be
called, where accelerate offloads it, to a hook on one of them, `_hf_hook`. diffusers looks for both by `hasattr` and `getattr`, whose
"no" takes a microsecond a module: with SDXL some ten milliseconds a picture, in which the GPU waits. Here the modules' own dicts
are asked, in the same order, to the same answer; and that a model is not offloaded in groups holds until a hook is registered
anywhere. By all pipelines, as long as one is prepared.
"""

import sys
from weakref import WeakSet

import torch
from diffusers.hooks import HookRegistry, group_offloading
from diffusers.utils import torch_utils

# Private both, and perhaps gone one day. The second is known to each pipeline's file by its name.
ASKED, ASKED_OF_DEVICE = "_get_top_level_group_offload_hook", "get_module_execution_device"
_own, _own_device = getattr(group_offloading, ASKED, None), getattr(torch_utils, ASKED_OF_DEVICE, None)
_register = HookRegistry.register_hook
_prepared, _without = WeakSet(), WeakSet()


def put(model):
    """Answer sooner, as long as `model` is prepared; `take` undoes it."""
    _without.clear()
    _prepared.add(model)
    HookRegistry.register_hook = register_hook
    if _own:
        setattr(group_offloading, ASKED, group_offload_hook)
    if _own_device:
        _everywhere(_own_device, execution_device)


def take(model):
    """Undo `put`: with the last model diffusers answers for itself again."""
    _prepared.discard(model)
    if is_asked():
        return
    HookRegistry.register_hook = _register
    if _own:
        setattr(group_offloading, ASKED, _own)
    if _own_device:
        _everywhere(execution_device, _own_device)


def is_asked():
    """Whether any model is prepared."""
    return len(_prepared) > 0


def _everywhere(known, new):
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and getattr(module, "__dict__", {}).get(ASKED_OF_DEVICE) is known:
            setattr(module, ASKED_OF_DEVICE, new)


def register_hook(registry, *args, **kwargs):
    """`HookRegistry.register_hook`, after which no model is known to be without one."""
    try:
        return _register(registry, *args, **kwargs)
    finally:
        _without.clear()


def group_offload_hook(module):
    """The first hook by which `module`, or one within it, is offloaded in groups, or None."""
    if module in _without:
        return None
    for own in _dicts(module):
        if "_diffusers_hook" in own:
            hook = own["_diffusers_hook"].get_hook(group_offloading._GROUP_OFFLOADING)
            if hook is not None:
                return hook
    if _prepared:  # registrations are seen
        _without.add(module)
    return None


def execution_device(module):
    """The device that the inputs of `module` have to be on."""
    if any("_hf_hook" in own for own in _dicts(module)) or group_offload_hook(module) is not None:
        return _own_device(module)
    device = getattr(module, "device", None)
    return _own_device(module) if device is None else torch.device(device)


def _dicts(module):
    """The attributes of `module` and of all within it, as `modules` walks them."""
    left = [module]
    while left:
        part = left.pop()
        if part is not None:
            yield part.__dict__
            if part._modules:
                left.extend(reversed(part._modules.values()))
