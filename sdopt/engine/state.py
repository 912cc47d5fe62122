"""What a captured graph depends on beside its inputs, and what cannot be captured."""

from itertools import repeat

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0

from sdopt.engine import fused

PROCESSORS = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0)
PLAIN = (torch.nn.Parameter, torch.Tensor)  # a quantised weight is of another class
FREEU = ("s1", "s2", "b1", "b2")
IN_PLACE = ("peft_config", "merged_adapters", "scaling")  # lists and dicts that peft writes to


def fingerprint(module: torch.nn.Module) -> tuple:
    """Equal for two moments if a graph captured at the first is right at the second: weights in their places, layers as set.

    Not the weights' values: a graph reads them anew. Introduced in notebooks/12_cuda_graphs.
    """
    found, left = [module.training], [module]
    while left:  # once a picture through thousands of modules: their dicts, without the detour of getattr
        part = left.pop()
        if part is None:
            continue
        own = part.__dict__
        found.append(type(part))
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values() if tensors else ():
                if tensor is not None:
                    found.append(tensor.data_ptr() if type(tensor) in PLAIN else id(tensor))
                    found.append(tensor.dtype)
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            found += _hooks(part)
        if "forward" in own and part is not module:
            found.append(getattr(part.forward, "__func__", part.forward))
        if "padding_mode" in own:  # of a convolution; one that wraps around makes pictures that tile
            found.append((own["padding_mode"], "_conv_forward" in own))
        if "processor" in own:
            found.append(type(part.processor))
        if "merged_adapters" in own:  # peft's layers: which LoRAs count, and how much, is Python's to know
            found.append((*part.active_adapters, *part.merged_adapters, part.disable_adapters))
            found += [(name, _baked(scale)) for name, scale in own.get("scaling", {}).items()]  # not all kinds have it
        if "s1" in own:
            found.append(tuple(own.get(name) for name in FREEU))
        if own["_modules"]:
            left.extend(own["_modules"].values())
    return tuple(found)


def _baked(scale):
    """What a graph holds of a strength: the number, or the address of a tensor on a GPU, where it is read anew."""
    if not isinstance(scale, torch.Tensor):
        return scale
    return scale.data_ptr() if scale.is_cuda else scale.item()


def _hooks(part):
    """The hooks on `part`, but for those by which transformers returns a model's hidden states: they can be captured."""
    hooks = {**part._forward_hooks, **part._forward_pre_hooks}
    return [
        key for key, hook in hooks.items() if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
    ]


def watch(module: torch.nn.Module):
    """A function that tells whether LoRAs, FreeU or attention processors of `module` were switched since.

    Quick enough for every call, unlike `fingerprint`: some 6 microseconds for SDXL, 60 with a LoRA in 700 places.
    """
    parts = [vars(part) for part in module.modules()]
    layers = [own for own in parts if "merged_adapters" in own]  # peft's
    owners = {"processor": [own for own in parts if "processor" in own], "peft_config": [vars(module)]}
    owners |= {"_disable_adapters": layers, "_active_adapter": layers}
    owners |= dict.fromkeys(FREEU, [vars(block) for block in getattr(module, "up_blocks", ())])
    written = [own[name] for own in (vars(module), *layers) for name in IN_PLACE if name in own]

    def now():
        return [[*map(dict.get, having, repeat(name))] for name, having in owners.items()]

    before, copies = now(), [each.copy() for each in written]
    return lambda: now() != before or written != copies


def why_not(module: torch.nn.Module) -> str | None:
    """Why `module` has to run eagerly, in a few words, or None. Introduced in notebooks/12_cuda_graphs."""
    if module.training:
        return "it is in training mode"
    if getattr(module, "encoder_hid_proj", None) is not None:
        return "an IP-Adapter, or another projection of what it is given, is loaded"
    for name, part in module.named_modules():
        if part is module:
            continue
        if _hooks(part):
            return f"{name} has a hook"
        if "_conv_forward" in vars(part) or ("forward" in vars(part) and not fused.is_ours(part)):
            return f"{name} has another forward"
        if hasattr(part, "processor") and type(part.processor) not in PROCESSORS:
            return f"{name} has a processor unknown here, {type(part.processor).__name__}"
        if any(getattr(part, factor, None) is not None for factor in FREEU):
            return "FreeU is enabled"
        if not all(weight is None or type(weight) in PLAIN for weight in part._parameters.values()):
            return f"{name} has weights of another kind of tensor"
    return None
