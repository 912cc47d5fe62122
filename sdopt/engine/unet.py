"""A UNet's calls by CUDA graphs, with what is the same at every step of a picture computed once."""

from contextlib import nullcontext
from contextvars import ContextVar

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.models.upsampling import Upsample2D

from sdopt.engine import fp8, fused, graphs, plain, state
from sdopt.engine.once import Once, using

OF_PROMPT = ("encoder_hidden_states", "text_embeds", "time_ids")
of_call = ContextVar("of_call", default=None)  # what a pipeline's call is told apart by, while it lasts


class UNet(graphs.Captured):
    """`UNet2DConditionModel.forward`, to the same result.

    At a shape's first call two graphs are captured: one of what is computed from the prompt, replayed when the prompt is
    another or a picture begins, and one of a step. Arguments that are not known here are left to diffusers. `rounding`:
    which of its layers are in e4m3 (see `fp8`), None for none.
    """

    rounding = None
    before = ((), None, None)  # what `engine.restore` puts back: weights whose layout was changed, scheduler, ControlNet
    held = None  # what is computed once
    last = None  # the timestep of the call before
    picture = 0  # counts them
    switched = None  # tells whether a LoRA or the like was, since the picture began
    begun = None  # the call of a pipeline whose picture has begun already, as `of_call` has it

    def __init__(self, module, memory, limit):
        super().__init__(module, memory, limit)
        self.gathering = graphs.Memory()  # of its own: what is computed from weights may be so beside other graphs

    @torch.compiler.disable
    def __call__(self, sample, timestep, encoder_hidden_states, *args, return_dict=True, **kwargs):
        inputs, unknown = _named(sample, timestep, encoder_hidden_states, args, kwargs)
        begun, self.begun = self.begun, None
        graphs.join(self.gathering)
        if not _follows(self.last, timestep) and (begun is None or begun is not of_call.get() or self.switched()):
            self.begin()
        self.last = timestep
        reason = unknown or self.obstacle()
        if reason:
            given = (sample, timestep, encoder_hidden_states, *args)
            return self.eagerly(reason, *given, return_dict=return_dict, **kwargs)
        with self.memory.lock:
            out = self.entry(graphs.shapes(inputs), lambda: _Entry(self, inputs)).step(inputs)
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    def __deepcopy__(self, memo):
        copied, (turned, *others) = super().__deepcopy__(memo), self.before
        copied.before = [memo[id(weight)] for weight in turned if id(weight) in memo], *(memo.get(id(part)) for part in others)
        copied.rounding = self.rounding
        return copied

    def begin(self, mark=None, call=None):
        """Before a picture: see that the graphs are still right, and compute again what was computed from weights.

        With a `mark`, of before what the GPU is still at, beside that; `call`: the pipeline's call that it is done for, in which
        nothing can change until the UNet is called.
        """
        self.picture += 1
        self.begun = None
        changed = self.look()
        if changed:
            self.held = None
        if changed or self.switched():
            self.switched = state.watch(self.module)
        if self.reason is None:
            with self.memory.lock:
                with torch.inference_mode(False):  # what it holds is written to outside it, too
                    self.held = self.held or _held(self.module, self.rounding)
                # a capture waits for all that was started, and takes memory that others may still be at
                with graphs.beside(self.gathering, mark) if mark and self.held.replay else nullcontext():
                    self.held.renew(lambda call: graphs.capture(call, self.gathering))
        self.begun = call

    def obstacle(self):
        switched = "LoRAs, FreeU or attention processors were switched within a picture"
        return super().obstacle() or (switched if self.switched() else None)


class _Entry:
    """The graphs for one shape of the inputs."""

    def __init__(self, unet, inputs):
        self.unet, self.held, forward = unet, unet.held, type(unet.module).forward
        device = next(unet.module.parameters()).device
        self.places = {name: graphs.place(tensor, device) for name, tensor in inputs.items()}
        self.prompt, self.picture = {}, None
        # Outside the graphs' memory: what is written there by one graph, another may use for what it needs in between. And
        # held here: a graph knows addresses, and keeps nothing alive that lies there.
        of_prompt = self.of_prompt = self.held.read_prompt(self.places["encoder_hidden_states"])

        def read_prompt():
            new = self.held.read_prompt(self.places["encoder_hidden_states"])
            for part in range(3):  # keys, values and scales, those of all layers at once: a copy's tensors have one dtype
                if pairs := [(kept[part], new[layer][part]) for layer, kept in of_prompt.items() if len(kept) > part]:
                    torch._foreach_copy_(*map(list, zip(*pairs)))

        self.read_prompt, _ = graphs.capture(read_prompt, unet.memory)

        def call():
            with using(self.held, of_prompt):
                return forward(unet.module, **_as_call(self.places), return_dict=False)[0]

        self.replay, self.output = graphs.capture(call, unet.memory)

    def step(self, inputs):
        """The UNet's output for `inputs`, in a tensor of its own: a scheduler may keep it."""
        prompt = {name: inputs[name] for name in OF_PROMPT if name in inputs}
        if self.picture != self.unet.picture or not all(self._has(name, tensor) for name, tensor in prompt.items()):
            graphs.put(self.places, prompt)
            self.read_prompt()
            self.prompt = {name: (tensor, _version(tensor)) for name, tensor in prompt.items()}
            self.picture = self.unet.picture
        graphs.put(self.places, {name: tensor for name, tensor in inputs.items() if name not in prompt})
        self.replay()
        return self.output.clone()

    def _has(self, name, tensor):
        """Whether `tensor` is the very one that was put in its place, and has not been written to since."""
        held, version = self.prompt.get(name, (None, None))
        return held is tensor and version is not None and version == _version(tensor)


def _held(unet, rounding):
    resnets = [m for m in unet.modules() if type(m) is ResnetBlock2D and plain.resnet(m)]
    transformers = [m for m in unet.modules() if type(m) is Transformer2DModel and plain.transformer(m)]
    blocks = [block for model in transformers for block in model.transformer_blocks]
    layers = [block.attn2 for block in blocks if plain.attention(block.attn2)]
    rounded = fp8.layers(blocks, rounding, resnets)
    selves = [block.attn1 for block in blocks if plain.joinable(block.attn1) and block.attn1 not in rounded]
    upsamplers = [m for m in unet.modules() if type(m) is Upsample2D and plain.upsample(m)]
    ends = {model: pair for model in transformers if (pair := plain.ends(model))}
    return Once(resnets, layers, upsamplers, fused.keys_and_values, selves, rounded, ends)


def _named(sample, timestep, text, args, kwargs):
    """(the call's tensors by name, None), or (None, what in it is unknown)."""
    given = {name: value for name, value in kwargs.items() if value is not None and value != {}}
    added = given.pop("added_cond_kwargs", {})
    down = given.pop("down_block_additional_residuals", ())
    middle = given.pop("mid_block_additional_residual", None)
    unknown = [*given, *(name for name in added if name not in OF_PROMPT)]
    if unknown or any(value is not None for value in args):
        return None, f"it was called with {', '.join(unknown) or 'more arguments'}"
    if bool(down) != (middle is not None):
        return None, "it was called with residuals that are not a ControlNet's"
    if text is None:
        return None, "it was called without a prompt"
    timestep = torch.as_tensor(timestep).float()  # as its embedding does; schedulers differ in the dtype
    residuals = {f"residual_{n}": tensor for n, tensor in enumerate(down)}
    residuals |= {} if middle is None else {"residual_middle": middle}
    return {"sample": sample, "timestep": timestep, "encoder_hidden_states": text, **added, **residuals}, None


def _as_call(places):
    """The keywords of `UNet2DConditionModel.forward` from tensors by name: the other way round."""
    own = {name: places[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    added = {name: places[name] for name in ("text_embeds", "time_ids") if name in places}
    down = [tensor for name, tensor in places.items() if name.startswith("residual_") and name != "residual_middle"]
    middle = places.get("residual_middle")
    return own | {
        "added_cond_kwargs": added or None,
        "down_block_additional_residuals": tuple(down) or None,
        "mid_block_additional_residual": middle,
    }


def _follows(last, timestep):
    """Whether a call at `timestep` goes on with the picture of the call at `last`; where it cannot be told, it does not.

    Timesteps on a GPU are parts of one tensor, and only their places in it are looked at: to look at their values would make
    the loop wait. `last` is the tensor itself, so that nothing else can lie at its address. Plain numbers do not tell.
    """
    if not (isinstance(timestep, torch.Tensor) and isinstance(last, torch.Tensor)) or timestep.device != last.device:
        return False
    same = timestep.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    return same and timestep.storage_offset() > last.storage_offset()


def _version(tensor):
    """How often `tensor` was written to, or None if PyTorch does not count (in inference mode)."""
    return None if tensor.is_inference() else tensor._version
