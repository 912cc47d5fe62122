"""A picture's beginning, before the UNet's first call: while the GPU is busy with the prompt, and the CPU would wait for it.

What the UNet sees to before a picture (are its graphs still right, what follows from its weights) takes milliseconds, in which a GPU
that waits for the first step does nothing. A pipeline's call encodes its prompt first: by then its picture has begun, and until the
UNet is called nothing runs but diffusers. So the UNet takes it as begun within that very call and nowhere else: weights may change
after a call that failed, or a prompt encoded by hand. Where others' code has its turn in between (a class that is not diffusers'
own, a hook on the UNet), nothing begins early. In all pipelines of a class, as long as one is prepared.
"""

from functools import wraps

from sdopt.engine import graphs, hooks, unet

_own = {}  # {(class, name): its function}, of those that stand replaced


def put(pipe):
    """Let the pictures of all prepared pipelines of this class begin when their prompt has been encoded; `take` undoes it."""
    for name, replaced in (("__call__", _called), ("encode_prompt", _encoded)):
        owner = next((cls for cls in type(pipe).__mro__ if name in vars(cls)), None)
        if _is_stock(pipe) and owner and (owner, name) not in _own:
            own = _own[owner, name] = vars(owner)[name]
            setattr(owner, name, wraps(own)(replaced(own)))


def take():
    """Undo `put`, if no pipeline is prepared any more."""
    while _own and not hooks.is_asked():
        (owner, name), own = _own.popitem()
        setattr(owner, name, own)


def _is_stock(pipe):
    return type(pipe).__module__.startswith("diffusers.")


def _forward(pipe):
    forward = getattr(getattr(pipe, "unet", None), "__dict__", {}).get("forward")
    return forward if isinstance(forward, unet.UNet) else None


def _called(own):
    def call(pipe, *args, **kwargs):
        token = unet.of_call.set(object())
        try:
            return own(pipe, *args, **kwargs)
        finally:
            unet.of_call.reset(token)
            if forward := _forward(pipe):  # what it holds may be given back after a call that failed
                graphs.join(forward.gathering)

    return call


def _encoded(own):
    def encode_prompt(pipe, *args, **kwargs):
        forward, call = _forward(pipe), unet.of_call.get()
        if forward is None or call is None or not _is_stock(pipe) or pipe.unet._forward_pre_hooks:
            return own(pipe, *args, **kwargs)
        before = graphs.mark(pipe.unet)
        if forward.rounding:  # of the weights, which takes a GPU longer than the prompt does
            forward.begin(before, call)
        encoded = own(pipe, *args, **kwargs)
        if not forward.rounding:
            forward.begin(before, call)
        return encoded

    return encode_prompt
