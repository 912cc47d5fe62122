from types import SimpleNamespace

import pytest
import torch

from sdopt import profiling


def event(name, device, us=0, named_range=False):
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        is_user_annotation=named_range,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
    )


@pytest.fixture
def seen(monkeypatch):
    """What PyTorch's profiler sees, to be filled by a test."""
    events = []

    class Profiler:
        __enter__ = lambda self: self
        __exit__ = lambda self, *_: None
        events = lambda self: events_seen

    events_seen = events
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    return events


def test_a_cpu_has_operators_and_no_kernels():
    x = torch.ones(4, 4)
    found = profiling.profile(lambda: x @ x)
    assert "aten::mm" in found.operators
    assert found.kernels == {}


def test_kernels_have_the_time_of_all_their_runs_and_ranges_are_none(seen):
    seen += [event("aten::mm", "CPU", 900), event("nvjet", "CUDA", 30), event("nvjet", "CUDA", 20)]
    seen += [event("Memset (Device)", "CUDA", 5), event("## Call CompiledFxGraph", "CUDA", 80, named_range=True)]
    found = profiling.profile(lambda: None)
    assert found.operators == {"aten::mm"}
    assert found.kernels == pytest.approx({"nvjet": 50e-6, "Memset (Device)": 5e-6})
    assert found.names == {"aten::mm", "nvjet", "Memset (Device)"}


def test_a_gpu_that_seems_to_do_nothing_was_not_seen(seen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    seen += [event("aten::mm", "CPU", 900)]
    with pytest.raises(RuntimeError, match="no kernel of the GPU"):
        profiling.profile(lambda: None)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16>", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>", "convolution"),
        ("void convolve_common_engine_float_NHWC<__nv_bfloat16>", "convolution"),
        ("triton_tem_fused_convolution_12", "convolution"),
        ("triton_tem_fused_addmm_7", "matrix product"),
        ("triton_tem_fused__unsafe_view_add_clone_convolution_div_mm_native_group_norm_silu_t_view_60", "matrix product"),
        ("triton_tem_fused__scaled_dot_product_efficient_attention__unsafe_view_add_mm_t_8", "matrix product"),
        ("triton_tem_fused_addmm_convolution_silu_9", "convolution"),
        ("_linear_geglu", "matrix product"),
        ("_conv", "convolution"),
        ("_prompt_attention", "attention"),
        ("_self_attention", "attention"),
        ("_add_layer_norm", "other"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "matrix product"),
        ("ampere_sgemm_128x64_tn", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_i161616gemm_s8_128x128_32x2_tn_align16>", "matrix product"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matrix product"),
        ("triton_poi_fused_clone_convolution_native_group_norm_silu_120", "other"),
        ("triton_red_fused_add_div_native_layer_norm_view_57", "other"),
        ("void at::native::(anonymous namespace)::softmax_warp_forward<float>", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert profiling.kind_of(kernel) == kind
    assert profiling.by_kind({kernel: 2.0}) == dict.fromkeys((*profiling.KINDS, "other"), 0.0) | {kind: 2.0}


def test_the_longest_kernels_of_each_kind_come_first_and_by_names_of_a_line():
    fused = "triton_poi_fused_" + "add_" * 40
    kernels = {"nvjet_a": 1.0, "nvjet_b": 3.0, "nvjet_c": 2.0, fused + "7": 0.5, fused + "8": 0.25}
    longest = profiling.longest(kernels, each=2)
    assert {kind: list(of.items()) for kind, of in longest.items()} == {
        "matrix product": [("nvjet_b", 3.0), ("nvjet_c", 2.0)], "other": [(fused[:100], 0.75)]
    }


@pytest.mark.gpu
def test_a_graphs_kernels_are_seen_with_their_times():
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    step = torch.compile(lambda x: (x @ a).relu() + 1, mode="reduce-overhead")
    for _ in range(3):
        step(a)
    kinds = profiling.by_kind(profiling.profile(lambda: step(a)).kernels)
    assert kinds["matrix product"] > 0 and kinds["attention"] == 0
    assert 50e-6 < sum(kinds.values()) < 5e-3, "137 GFLOP take a large GPU a fraction of a millisecond"
