"""A UNet's blocks on our kernels against diffusers' own code, in Triton's interpreter, float32."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from sdopt.engine import fused, plain, residual
from sdopt.kernels import launch, linear_geglu, self_attention
from sdopt.kernels.prompt_attention import MOST_KEYS

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU is there, and Triton compiles for it")


GROUPS = 4  # the interpreter takes its time for each


@pytest.fixture
def unet(request):
    """A UNet like SDXL's, of two levels; like Stable Diffusion 1.5's where a test asks for "sd15"."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(24, 40),
        norm_num_groups=GROUPS,
        layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=getattr(request, "param", "sdxl") == "sdxl",
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
    ).eval()


@pytest.fixture
def kernels(monkeypatch):
    """The names of the kernels that ran, in their order."""
    ran = []
    for name in (
        *("group_norm", "add_layer_norm", "geglu", "linear_geglu", "bias_residual", "upsample_conv", "softmax"),
        *("prompt_attention", "self_attention", "shortcut"),
    ):
        user = fused if hasattr(fused, name) else residual
        function = getattr(user, name)
        monkeypatch.setattr(user, name, lambda *a, n=name, f=function: (ran.append(n), f(*a))[1])
    return ran


def unet_call(unet, height=4, width=6, batch=1, tokens=7):
    """A call of a UNet with random inputs, as a function; its result in float32."""
    torch.manual_seed(1)
    latents = torch.randn(batch, 4, height, width).to(unet.dtype)
    text = torch.randn(batch, tokens, 64).to(unet.dtype)

    @torch.no_grad()
    def call():
        return unet(latents, torch.tensor(400), text).sample.float()

    return call


def assert_same(ours, theirs):
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def transformer_blocks(unet):
    return [block for m in unet.modules() if type(m) is Transformer2DModel for block in m.transformer_blocks]


def counts(unet):
    kinds = (ResnetBlock2D, Transformer2DModel, Upsample2D, tuple(plain.UPS))
    return [sum(type(m) in (kind if isinstance(kind, tuple) else (kind,)) for m in unet.modules()) for kind in kinds]


@pytest.mark.parametrize("unet", ["sdxl", "sd15"], indirect=True)
def test_a_fused_unet_computes_what_the_stock_one_does(unet, kernels):
    call = unet_call(unet, batch=2)
    theirs = call()
    resnets, transformers, upsamplers, ups = counts(unet)
    blocks = len(transformer_blocks(unet))
    shortcuts = sum(type(m) is ResnetBlock2D and m.conv_shortcut is not None for m in unet.modules())
    assert fused.fuse(unet) == fused.fuse(unet) == resnets + transformers + upsamplers + ups
    assert_same(call(), theirs)
    assert [kernels.count(k) for k in ("group_norm", "bias_residual", "shortcut", "add_layer_norm", "geglu", "upsample_conv")] == [
        2 * resnets + transformers + 1,  # the last before the output
        resnets - shortcuts,
        shortcuts,
        3 * blocks,
        blocks,
        upsamplers,
    ]
    assert upsamplers and kernels.count("prompt_attention") == blocks
    fused.release(unet)
    kernels.clear()
    assert torch.equal(call(), theirs) and not kernels


class Cats(TorchDispatchMode):
    """Counts the images that are written side by side as one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.cat.default and args[0][0].ndim == 4 and args[1:] == (1,)
        return function(*args, **kwargs or {})


def odd_layout(unet):
    weight = unet.up_blocks[0].resnets[0].conv_shortcut.weight.data
    return torch.nn.Parameter(weight.transpose(0, 1).contiguous().transpose(0, 1))


def lora_on_a_shortcut(unet):
    targets = [name for name, _ in unet.up_blocks.named_modules() if name.endswith("conv_shortcut")][:1]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=[f"up_blocks.{name}" for name in targets], init_lora_weights=False))


@pytest.mark.parametrize(
    ("change", "written"),
    [
        (lambda unet: None, 0),
        (lambda unet: unet.up_blocks[0].resnets[1].register_forward_pre_hook(lambda part, args: (args[0] + 1, args[1])), 1),
        (lambda unet: unet.up_blocks[1].resnets[0].norm1.register_forward_hook(lambda part, args, out: out + 1), 1),
        (lambda unet: unet.up_blocks[1].resnets[0].nonlinearity.register_forward_hook(lambda part, args, out: out + 1), 1),
        (lora_on_a_shortcut, 1),
        (lambda unet: setattr(unet.up_blocks[0].resnets[0].conv_shortcut, "weight", odd_layout(unet)), 1),
        (lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4), 4),
        (lambda unet: setattr(unet.up_blocks[0], "attentions", unet.up_blocks[0].attentions[:1]), 0),
    ],
    ids=[
        *("as it is", "a hook on a block", "a hook on a norm", "a hook on an activation", "a LoRA on a shortcut"),
        *("a shortcut of another layout", "FreeU", "fewer attentions"),
    ],
)
def test_an_image_and_its_skip_connection_are_not_written_as_one(unet, kernels, change, written):
    """But where somebody looks at what a block is given, or does something else with it."""
    torch.manual_seed(2)
    change(unet)
    call = unet_call(unet, 4, 8, batch=2)
    theirs = call()
    fused.fuse(unet)
    with Cats() as cats:
        assert_same(call(), theirs)
    assert cats.count == written and "group_norm" in kernels
    fused.release(unet)
    with Cats() as cats:
        assert torch.equal(call(), theirs)
    assert cats.count == sum(len(getattr(up, "attentions", up.resnets)) for up in unet.up_blocks)


@torch.no_grad()
def test_an_up_block_can_be_called_as_diffusers_is(unet, kernels, monkeypatch):
    """By hand with more arguments, and with somebody listening to all modules or in another's place."""
    torch.manual_seed(3)
    cross, plain_up = unet.up_blocks
    text, temb = torch.randn(1, 7, 64), torch.randn(1, unet.time_embedding.linear_2.out_features)
    x, skips = torch.randn(1, 40, 4, 4), (torch.randn(1, 24, 4, 4), torch.randn(1, 40, 4, 4))
    y, others = torch.randn(1, 40, 4, 4), (torch.randn(1, 24, 4, 4), torch.randn(1, 24, 4, 4))
    calls = [
        lambda: cross(x, skips, temb, text), lambda: cross(x, skips, temb, text, None, (9, 7)),
        lambda: cross(x, skips, temb, encoder_hidden_states=text, upsample_size=(9, 7)),
        lambda: plain_up(y, others, temb), lambda: plain_up(y, others, temb, None), lambda: plain_up(y, others, temb, upsample_size=None),
    ]  # fmt: skip
    theirs = [call() for call in calls]
    fused.fuse(unet)
    for call, right in zip(calls, theirs, strict=True):
        assert_same(call(), right)
    listening = torch.nn.modules.module.register_module_forward_pre_hook(lambda part, args: (args[0] * 1, *args[1:]))
    assert_same(calls[0](), theirs[0])
    listening.remove()

    class Other(ResnetBlock2D):
        def __call__(self, x, temb):
            return super().__call__(x * 1, temb)

    cross.resnets[0].__class__ = Other
    assert_same(calls[0](), theirs[0])
    forward = type(plain_up).forward
    monkeypatch.setattr(type(plain_up), "forward", lambda self, *a, **k: 2 * forward(self, *a, **k))
    assert_same(calls[3](), 2 * theirs[3])


def test_of_many_rows_a_feed_forwards_first_half_is_one_kernel(unet, kernels, monkeypatch):
    blocks, call = transformer_blocks(unet), unet_call(unet.half(), 4, 8, batch=2)
    theirs = call()
    fused.fuse(unet)
    monkeypatch.setattr(linear_geglu, "ENOUGH", 2 * 2 * 4)  # the positions of two images half as high and wide
    blocks[0].ff.net[0].proj.register_forward_hook(lambda *_: None)
    assert (call() - theirs).abs().max() < 0.01 * theirs.abs().max()
    assert kernels.count("linear_geglu") == len(blocks) - 1 and kernels.count("geglu") == 1, "one that is listened to is called"
    kernels.clear()
    monkeypatch.setattr(linear_geglu, "ENOUGH", 2 * 2 * 4 + 1)
    call()
    assert kernels.count("geglu") == len(blocks) and "linear_geglu" not in kernels


def test_few_positions_attend_to_each_other_by_our_kernel(unet, kernels, monkeypatch):
    """From one product, of heads of its width, in 16 bits; a library's for more positions."""
    unet = UNet2DConditionModel.from_config(dict(unet.config, block_out_channels=(24, 64))).eval().half()
    blocks, call = transformer_blocks(unet), unet_call(unet, 6, 8, batch=2)
    theirs = call()
    fused.fuse(unet)
    monkeypatch.setattr(self_attention, "FAST", 16)
    call()
    assert "self_attention" not in kernels, "three products"
    unet.fuse_qkv_projections()
    assert (call() - theirs).abs().max() < 0.01 * theirs.abs().max()
    assert kernels.count("self_attention") == len(blocks)
    kernels.clear()
    monkeypatch.setattr(self_attention, "FEW", 2 * 3 * 4 * 4 - 1)  # two images half as high and wide, four heads
    call()
    assert "self_attention" not in kernels


def test_a_prompt_too_long_for_one_program_is_left_to_pytorch(unet, kernels):
    for tokens, ours in ((MOST_KEYS, True), (MOST_KEYS + 1, False)):
        call = unet_call(unet, tokens=tokens)
        fused.release(unet)
        theirs = call()
        fused.fuse(unet)
        kernels.clear()
        assert_same(call(), theirs)
        assert ("prompt_attention" in kernels) == ours


def test_fused_projections_are_used(unet, kernels):
    call = unet_call(unet)
    theirs = call()
    fused.fuse(unet)
    unet.fuse_qkv_projections()
    separate = [m for name, m in unet.named_modules() if name.endswith(("to_k", "to_v"))]
    for layer in separate:
        layer.register_forward_hook(lambda *_: pytest.fail("a projection that was fused is called alone"))
    assert_same(call(), theirs)


def test_a_vae_decodes_the_same(kernels, monkeypatch):
    monkeypatch.setattr(plain, "WIDEST", 16)
    torch.manual_seed(0)
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(16, 24), norm_num_groups=GROUPS, latent_channels=4, **ends).eval()
    latents = torch.randn(1, 4, 6, 5)
    with torch.no_grad():
        theirs = vae.decode(latents).sample
        blocks = fused.fuse(vae.decoder)
        assert_same(vae.decode(latents).sample, theirs)
    assert sum(kernels.count(name) for name in ("bias_residual", "shortcut", "upsample_conv", "softmax")) == blocks
    assert "softmax" in kernels, "the attention in its middle"


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_wide_attention_in_parts(kernels, monkeypatch, batch):
    torch.manual_seed(0)
    attn = Attention(24, heads=1, dim_head=24, norm_num_groups=GROUPS, residual_connection=True, bias=True).eval()
    attn.set_processor(AttnProcessor2_0())
    monkeypatch.setattr(plain, "WIDEST", 23)
    x = torch.randn(batch, 24, 5, 7)
    theirs = attn(x)
    fused.fuse(attn)
    for most, parts in ((2**26, 1), (350, {1: 4, 3: 12}[batch])):
        monkeypatch.setattr(fused, "SCORES", most)
        kernels.clear()
        assert_same(attn(x, temb=None), theirs)
        assert kernels == ["group_norm", *["softmax"] * parts]
    kernels.clear()
    monkeypatch.setattr(plain, "WIDEST", 24)
    assert torch.equal(attn(x), theirs) and not kernels, "a narrow head is left to PyTorch"
    monkeypatch.setattr(plain, "WIDEST", 23)
    attn.heads = 2
    assert not torch.equal(attn(x), theirs) and not kernels, "two heads are left to diffusers"


@torch.no_grad()
def test_only_a_size_that_doubles_is_doubled(unet, kernels):
    """At a size that the levels do not divide, diffusers asks for another than twice the small one."""
    block = next(m for m in unet.modules() if type(m) is Upsample2D)
    x, call = torch.randn(1, block.channels, 3, 5), unet_call(unet, 5, 7)
    theirs = [block(x), block(x, (6, 10)), block(x, (5, 9)), call()]
    fused.fuse(unet)
    for size, right in zip((None, (6, 10), (5, 9)), theirs):
        kernels.clear()
        assert_same(block(x, size), right)
        assert kernels == ([] if size == (5, 9) else ["upsample_conv"])
    assert_same(call(), theirs[-1])


def test_a_lora_put_in_after_fusing_is_seen(unet, kernels):
    fused.fuse(unet)
    call = unet_call(unet)
    before = call()
    torch.manual_seed(0)
    targets = ["to_q", "to_v", "proj_in", "conv1", "conv", "ff.net.2"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    kernels.clear()
    changed = call()
    assert (changed - before).abs().max() > 1e-3 * before.abs().max()
    assert "geglu" in kernels, "a convolution with a LoRA is called, not read"
    assert not {"bias_residual", "upsample_conv"} & set(kernels)
    fused.release(unet)
    assert_same(changed, call())


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.set_attn_processor(AttnProcessor()),
        lambda unet: unet.mid_block.resnets[0].norm1.register_forward_hook(lambda m, a, out: out + 1),
        lambda unet: (
            unet.mid_block.attentions[0].transformer_blocks[0].norm3.register_forward_hook(lambda m, a, out: -out)
        ),
        lambda unet: setattr(unet.mid_block.resnets[1], "output_scale_factor", 2.0),
        lambda unet: unet.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(3, 1),
    ],
    ids=["attention by hand", "a hook in a resnet", "a hook in a transformer", "a scale", "chunks"],
)
def test_what_is_not_known_is_left_to_diffusers(unet, change):
    change(unet)
    call = unet_call(unet)
    theirs = call()
    fused.fuse(unet)
    assert_same(call(), theirs)


def test_an_attention_mask_reaches_diffusers(unet, kernels):
    model = next(m for m in unet.modules() if type(m) is Transformer2DModel)
    x, text = torch.randn(1, model.config.in_channels, 4, 4), torch.randn(1, 7, 64)
    mask = torch.zeros(1, 7).masked_fill_(torch.arange(7) > 3, -10000.0)[:, None]
    with torch.no_grad():
        theirs = model(x, text, encoder_attention_mask=mask, return_dict=False)[0]
        fused.fuse(unet)
        assert torch.equal(model(x, text, encoder_attention_mask=mask, return_dict=False)[0], theirs)
        assert not kernels
        assert not torch.equal(model(x, text, return_dict=False)[0], theirs) and kernels


def test_on_a_cpu_without_the_interpreter_and_in_other_dtypes_it_is_left_to_diffusers(unet, kernels, monkeypatch):
    call = unet_call(unet)
    theirs = call()
    fused.fuse(unet)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert torch.equal(call(), theirs) and not kernels
    monkeypatch.undo()
    with torch.no_grad():
        latents, text = torch.randn(1, 4, 4, 4).double(), torch.randn(1, 7, 64).double()
        assert unet.double()(latents, 400, text).sample.dtype is torch.float64


def test_gradients_are_diffusers(unet):
    fused.fuse(unet)
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    unet(latents, 400, torch.randn(1, 7, 64)).sample.sum().backward()
    assert latents.grad.abs().max() > 0


def test_a_forward_that_somebody_replaced_stays(unet):
    block, other = unet.mid_block.resnets[0], unet.conv_in
    block.forward = mine = lambda x, temb: x
    other.forward = theirs = lambda x: x
    assert fused.fuse(unet) == sum(counts(unet)) - 1
    fused.release(unet)
    assert vars(block)["forward"] is mine and vars(other)["forward"] is theirs
