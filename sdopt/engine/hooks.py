"""A question that diffusers asks of all modules of a pipeline several times a picture, and a sooner answer.

Whether a model is offloaded in groups is known to a registry on one of its modules, `_diffusers_hook`. diffusers looks for it by
`hasattr`, whose "no" takes a microsecond a module: with SDXL some ten milliseconds a picture, in which the GPU waits. Here the
modules' own dicts are asked, in the same order, to the same answer; and a "no" holds until a hook is registered anywhere. By all
pipelines, as long as one is prepared.
"""

from weakref import WeakSet

from diffusers.hooks import HookRegistry, group_offloading

ASKED = "_get_top_level_group_offload_hook"
_own = getattr(group_offloading, ASKED, None)  # private, and perhaps gone one day
_register = HookRegistry.register_hook
_prepared, _without = WeakSet(), WeakSet()


def put(model):
    """Answer sooner, as long as `model` is prepared; `take` undoes it."""
    _without.clear()
    _prepared.add(model)
    if _own:
        setattr(group_offloading, ASKED, group_offload_hook)
        HookRegistry.register_hook = register_hook


def take(model):
    """Undo `put`: with the last model diffusers answers for itself again."""
    _prepared.discard(model)
    if _own and not _prepared:
        setattr(group_offloading, ASKED, _own)
        HookRegistry.register_hook = _register


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
    left = [module]
    while left:
        part = left.pop()
        if part is None:
            continue
        own = part.__dict__
        if "_diffusers_hook" in own:
            hook = own["_diffusers_hook"].get_hook(group_offloading._GROUP_OFFLOADING)
            if hook is not None:
                return hook
        if part._modules:
            left.extend(reversed(part._modules.values()))
    if _prepared:  # registrations are seen
        _without.add(module)
    return None
