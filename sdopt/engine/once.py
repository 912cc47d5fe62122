"""What stays as it is from step to step, computed once: the prompt's keys and values, the upsamplers' folded weights; and
products of the same input as one: all time projections, and a self-attention's query, key and value; and biases that are added
to the same numbers as one: a residual block's and its shortcut's, and a model's last block's and the projection's after it.

`Once` holds it, and the blocks of `fused` take it from there while `using` lasts. What it holds was computed from weights, so
it is computed again for every picture: weights that were changed in place show in the next.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from torch.nn.functional import linear, pad, silu

from sdopt.engine import bounds, fp8
from sdopt.kernels.upsample_conv import folded

_now = ContextVar("now", default=None)  # a thread's own: another may draw with another pipeline


class Once:
    """For one UNet: `resnets`, its residual blocks, `layers`, those that look at the prompt, and its `upsamplers`.

    `keys_and_values(layer, text)` is how a layer's are made. `selves`: self-attention layers whose three projections
    can be joined. `rounded`: {module: what stands for it in e4m3} (see `fp8`), which rounds by itself. `ends`:
    {Transformer2DModel: (its last block's last layer, the projection after it)}, whose biases can be one. Introduced in
    notebooks/12_cuda_graphs.
    """

    def __init__(self, resnets, layers, upsamplers, keys_and_values, selves=(), rounded=None, ends=None):
        self.layers, self._keys_and_values, self.rounded = layers, keys_and_values, {} if rounded is None else rounded
        self.upsamplers, self.quarters = upsamplers, {}
        self.selves, self.joined = list(selves), {}
        self.ends, self.biases = ends or {}, {}
        self.resnets = [block for block in resnets if type(block.time_emb_proj) is nn.Linear]
        widths = [block.time_emb_proj.out_features for block in self.resnets]
        ends = torch.tensor(widths).cumsum(0).tolist()
        self.places = {block: (end - width, end) for block, width, end in zip(self.resnets, widths, ends)}
        self.doubles = [block for block in self.resnets if block.conv_shortcut is not None and block.conv_shortcut.bias is not None]
        self.weight = self.bias = self.shifts = self.replay = None

    @torch.no_grad()
    def gather(self):
        """Compute what is computed from weights, as they are now: a hundred short operations, and two a layer in e4m3.

        Copy weights together that meet the same input, and fold the upsamplers'. The time projections become one product of
        [samples, 1280] in place of some twenty; three projections as one keep more of a GPU's multiprocessors at work than each
        of them.
        """
        fp8.gather(list(self.rounded.values()))
        weights = [block.time_emb_proj.weight for block in self.resnets]
        biases = [block.time_emb_proj.bias + block.conv1.bias for block in self.resnets]
        if self.resnets and self.weight is None:
            self.weight, self.bias = torch.cat(weights), torch.cat(biases)
        elif self.resnets:  # at the same place: graphs read it there
            torch.cat(weights, out=self.weight)
            torch.cat(biases, out=self.bias)
        if self.doubles:
            pairs = [(block.conv2.bias, block.conv_shortcut.bias) for block in self.doubles]
            new = torch._foreach_add(*map(list, zip(*pairs)))
            if self.doubles[0] in self.biases:
                torch._foreach_copy_([self.biases[block] for block in self.doubles], new)
            else:
                self.biases |= zip(self.doubles, new)
        for block in self.upsamplers:
            new = folded(block.conv.weight)
            self.quarters[block] = self.quarters[block].copy_(new) if block in self.quarters else new
        for model, (layer, after) in self.ends.items():
            new = torch.addmv(after.bias, after.weight.flatten(1), layer.bias)
            self.biases[model] = self.biases[model].copy_(new) if model in self.biases else new
        for layer in self.selves:
            weights = [part.weight for part in (layer.to_q, layer.to_k, layer.to_v)]
            if layer in self.joined:
                torch.cat(weights, out=self.joined[layer])
            else:
                self.joined[layer] = torch.cat(weights)

    @torch.inference_mode(False)
    @torch.no_grad()
    def renew(self, capture):
        """`gather` by a graph, but for the first time; `capture(call)` runs `call` before, which makes room for what it gathers."""
        if self.replay:
            self.replay()
        else:
            self.replay, _ = capture(lambda: self.gather())

    @torch.no_grad()
    def join(self, layer):
        """The joined weights of a self-attention, None where they are not joined.

        Of one that stands in e4m3 they are made when it first has too few rows for that: in the call before a capture.
        """
        if layer in self.rounded and layer not in self.joined:
            self.selves.append(layer)
            self.joined[layer] = torch.cat([part.weight for part in self.rounded[layer].parts])
            self.replay = None
        return self.joined.get(layer)

    def read_prompt(self, text):
        """{layer: its keys and values, and where it gives e4m3 the scale of what it gives} of the prompt's embeddings `text`.

        `text`: [samples, tokens, channels].
        """
        read = {layer: self._keys_and_values(layer, text) for layer in self.layers}
        if rounds := [layer for layer in read if layer.to_out[0] in self.rounded]:
            scales = bounds.scale_of(torch.stack(bounds.of_all([read[layer][1] for layer in rounds])))
            apart = pad(scales[:, None], (0, 3))[:, 0]  # cuBLAS takes a scale that is at a multiple of 16 bytes
            read |= {layer: (*read[layer], scale) for layer, scale in zip(rounds, apart)}
        return read

    def shift_of(self, block, temb):
        if self.shifts is None:  # a step's first block computes it for all
            self.shifts = linear(silu(temb), self.weight, self.bias)
        start, end = self.places[block]
        return self.shifts[:, start:end]


@contextmanager
def using(held, of_prompt):
    """Within one step the blocks take `of_prompt`, what `held.read_prompt` returned, and the time projections of `held`.

    Introduced in notebooks/12_cuda_graphs.
    """
    token = _now.set((held, of_prompt))
    try:
        yield
    finally:
        _now.reset(token)
        held.shifts = None


def keys_and_values(layer):
    """The prompt's keys and values for an attention layer, if they have been computed."""
    return now[1].get(layer) if (now := _now.get()) else None


def joined(layer):
    """The weights of a self-attention layer's three projections, one below the other, if they have been joined."""
    return now[0].join(layer) if (now := _now.get()) else None


def rounded(part, rows):
    """What stands for a layer in e4m3, if its weights have been rounded and it is worth it for so many rows."""
    layer = now[0].rounded.get(part) if (now := _now.get()) else None
    return layer if layer and layer.pays(rows) else None


def bias_after(model, layer):
    """The bias of the projection after a model's blocks with that of `layer`, its last, in it, if there is one."""
    held = now[0] if (now := _now.get()) else None
    return held.biases[model] if held and model in held.biases and held.ends[model][0] is layer else None


def bias_of_end(block):
    """What is added to a residual block's second convolution: its bias, and its shortcut's."""
    if (now := _now.get()) and block in now[0].biases:
        return now[0].biases[block]
    own, narrow = block.conv2.bias, block.conv_shortcut
    return own if narrow is None or narrow.bias is None else own + narrow.bias


def quarters(block):
    """The folded weights of an upsampler, if they have been computed."""
    return now[0].quarters.get(block) if (now := _now.get()) else None


def shift(block, temb):
    """What a residual block adds to every position after its first convolution, that one's bias included, or None."""
    return now[0].shift_of(block, temb) if (now := _now.get()) and block in now[0].places else None
