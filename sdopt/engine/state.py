"""What a captured graph depends on beside its inputs, and what cannot be captured."""

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0

from sdopt.engine import fused

PROCESSORS = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0)
FREEU = ("s1", "s2", "b1", "b2")


def fingerprint(module: torch.nn.Module) -> tuple:
    """Equal for two moments if a graph captured at the first is right at the second: weights in their places, layers as set.

    Not the weights' values: a graph reads them anew.
    """
    found = []
    for part in module.modules():
        found.append(type(part))
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                found.append((tensor.data_ptr(), tensor.shape, tensor.dtype) if _is_plain(tensor) else id(tensor))
        if part._forward_hooks or part._forward_pre_hooks:
            found.append((*part._forward_hooks, *part._forward_pre_hooks))
        if "forward" in vars(part) and part is not module:
            found.append(getattr(part.forward, "__func__", part.forward))
        if hasattr(part, "processor"):
            found.append(type(part.processor))
        if hasattr(part, "merged_adapters"):  # peft's layers: which LoRAs count, and how much, is Python's to know
            found.append((*part.active_adapters, *part.merged_adapters, part.disable_adapters, *part.scaling.items()))
        if "s1" in vars(part):
            found.append(tuple(getattr(part, name, None) for name in FREEU))
    return tuple(found)


def why_not(module: torch.nn.Module) -> str | None:
    """Why `module` has to run eagerly, in a few words, or None."""
    if module.training:
        return "it is in training mode"
    if getattr(module, "encoder_hid_proj", None) is not None:
        return "an IP-Adapter, or another projection of what it is given, is loaded"
    for name, part in module.named_modules():
        if part is module:
            continue
        if part._forward_hooks or part._forward_pre_hooks:
            return f"{name} has a hook"
        if "forward" in vars(part) and not fused.is_ours(part):
            return f"{name} has another forward"
        if hasattr(part, "processor") and type(part.processor) not in PROCESSORS:
            return f"{name} has a processor unknown here, {type(part.processor).__name__}"
        if any(getattr(part, factor, None) is not None for factor in FREEU):
            return "FreeU is enabled"
        if not all(map(_is_plain, part._parameters.values())):
            return f"{name} has weights of another kind of tensor"
    return None


def _is_plain(tensor):
    return tensor is None or type(tensor.data) is torch.Tensor
