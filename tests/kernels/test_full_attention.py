import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topkbench.kernels.full_attention.api import Backend, full_attention, resolve_backend
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.testing import assert_attended

LN3 = math.log(3.0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("sunk", "width"), [(False, 16), (True, 16), (True, 10)])
@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("group", [1, 4])
def test_full_equals_sparse_over_everything(
    softcap: float | None, sunk: bool, width: int, ranged: bool, group: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 2 * group, 16)
    keys, values = torch.randn(2, 3, 2, 40, 16)[..., :31, :]
    values = values[..., :width]
    sinks = torch.randn(2 * group) if sunk else None
    start = torch.tensor([0, 7, 20], dtype=torch.int32) if ranged else None
    end = torch.tensor([31, 25, 12], dtype=torch.int32) if ranged else None
    everything = torch.arange(31, dtype=torch.int32).expand(3, 2, 31)
    expected, _ = sparse_attention(
        query,
        keys,
        values,
        everything,
        0.3,
        None,
        None,
        1,
        start,
        end,
        softcap,
        sinks,
        impl="reference",
    )
    out = full_attention(query, keys, values, 0.3, start, end, softcap, sinks)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if ranged:
        assert not bool(out[2].any())  # this row has no valid slot


def test_bad_input_is_refused() -> None:
    query, cache = torch.zeros(1, 4, 16), torch.zeros(1, 2, 9, 16)
    with pytest.raises(
        ValueError,
        match="one of auto, sdpa, cpu, triton, flash_attn, flash_attn_3, flashinfer, got 'sdp'",
    ):
        full_attention(query, cache, cache, 1.0, backend="sdp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs tensors on a cuda device, got cpu"):
        full_attention(query, cache, cache, 1.0, backend="flash_attn")
    with pytest.raises(ValueError, match=r"value_states must be .* = \[1, 2, 9, \*\]"):
        full_attention(query, cache, cache[:, :, :8], 1.0)
    with pytest.raises(ValueError, match=r"sinks must be \[Hq\] = \[4\], got \[2\]"):
        full_attention(query, cache, cache, 1.0, sinks=torch.zeros(2))
    with pytest.raises(TypeError, match="sinks must be floating point, got int32"):
        full_attention(query, cache, cache, 1.0, sinks=torch.zeros(4).int())


@pytest.mark.parametrize("backend", ["flash_attn", "flash_attn_3", "flashinfer"])
def test_libraries_refuse_sinks_and_values_of_another_width(backend: Backend) -> None:
    query, cache = torch.zeros(1, 4, 16), torch.zeros(1, 2, 9, 16)
    with pytest.raises(ValueError, match="no sinks, got sinks; use backend='triton' or 'sdpa'"):
        full_attention(query, cache, cache, 1.0, sinks=torch.zeros(4), backend=backend)
    with pytest.raises(ValueError, match=r"one width .* got keys of 16 and values of 8; use"):
        full_attention(query, cache, cache[..., :8], 1.0, backend=backend)


def test_a_sink_is_in_the_denominator() -> None:
    query, keys = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[[0.0, 9.0], [LN3, 0.0]]]])
    values = torch.tensor([[[[8.0, 0.0, 0.0], [0.0, 16.0, 8.0]]]])
    # logits 0, ln 3 and the sink's ln 4: weights 1/8, 3/8 and 1/2, the last without a value
    out = full_attention(query, keys, values, 0.5, sinks=torch.tensor([math.log(4.0)]))
    torch.testing.assert_close(out, torch.tensor([[[1.0, 6.0, 3.0]]]))


def test_a_missing_library_gives_an_error_of_one_sentence() -> None:
    from topkbench.kernels.full_attention import libraries

    with pytest.raises(ValueError, match=r"needs the package none-such.* use backend='sdpa'"):
        libraries.imported("no_such_library", "none-such")


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_cpus_kernel_agrees_with_attention_over_everything(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    batch, kv_heads, group = (draw(st.integers(1, 3)), draw(st.integers(1, 3)),
                              draw(st.sampled_from([1, 2, 3, 4, 7, 8])))  # fmt: skip
    n = draw(st.sampled_from([1, 5, 31, 32, 33, 64, 200, 1300]))
    dim, width = (draw(st.sampled_from([8, 16, 40, 64, 128])) for _ in range(2))
    softcap = draw(st.sampled_from([None, 3.0]))
    torch.manual_seed(draw(st.integers(0, 99)))
    query = torch.randn(batch, kv_heads * group, dim).to(dtype)
    states = torch.randn(2, batch, kv_heads, n + 9, max(dim, width)).to(dtype)
    start = torch.randint(0, n + 1, (batch,), dtype=torch.int32)
    end = torch.randint(0, n + 1, (batch,), dtype=torch.int32)
    if not draw(st.booleans()):
        start, end = torch.zeros_like(start), torch.full_like(end, n)
    slots = torch.arange(n + 9)
    outside = (slots < start[:, None]) | (slots >= end[:, None])
    # What lies outside a row's range is never read.
    states.masked_fill_(outside[:, None, :, None], torch.nan)
    keys, values = states[:, :, :, :n]
    keys, values = keys[..., :dim], values[..., :width]
    sinks = torch.randn(kv_heads * group) if draw(st.booleans()) else None
    out = full_attention(query, keys, values, dim**-0.5, start, end, softcap, sinks, "cpu")
    assert (out.dtype, out.shape) == (dtype, (batch, kv_heads * group, width))
    everything = torch.arange(n, dtype=torch.int32).expand(batch, kv_heads, n)
    given = (everything, dim**-0.5, None, None, 1, start, end, softcap, sinks)
    assert_attended(out, None, query, keys.nan_to_num(), values.nan_to_num(), *given)


def test_the_cpus_kernel_reads_float32_and_bfloat16_alone() -> None:
    query, cache = torch.zeros(1, 4, 16).double(), torch.zeros(1, 2, 9, 16).double()
    with pytest.raises(TypeError, match=r"key_states must be float32 or bfloat16 .* got float64"):
        full_attention(query, cache, cache, 1.0, backend="cpu")


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "expected"),
    [
        ("auto", "cpu", torch.float32, "cpu"),
        ("auto", "cpu", torch.bfloat16, "cpu"),
        ("auto", "cpu", torch.float16, "sdpa"),  # which our kernel does not read
        ("auto", "cuda", torch.bfloat16, "sdpa"),
        ("sdpa", "cpu", torch.float32, "sdpa"),
        ("flash_attn", "cuda", torch.bfloat16, "flash_attn"),
    ],
)
def test_auto_is_the_fastest_kernel_that_was_measured(
    backend: Backend, device: str, dtype: torch.dtype, expected: Backend
) -> None:
    assert resolve_backend(backend, torch.device(device), dtype) == expected


def test_auto_attends_in_a_dtype_that_our_kernel_does_not_read() -> None:
    query, cache = torch.randn(1, 4, 16).double(), torch.randn(1, 2, 9, 16).double()
    found = full_attention(query, cache, cache, 0.25, backend="auto")
    assert torch.equal(found, full_attention(query, cache, cache, 0.25, backend="sdpa"))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("dtype", "group", "dim", "width"),
    [
        (torch.float32, 1, 64, 64),
        (torch.bfloat16, 4, 192, 128),
        (torch.float16, 5, 80, 80),
        (torch.float32, 2, 24, 40),
    ],
)
def test_errors_of_split_k_attention_are_within_their_bound(
    triton_device: torch.device,
    group: int,
    dim: int,
    width: int,
    dtype: torch.dtype,
    softcap: float | None,
) -> None:
    torch.manual_seed(0)
    sinks = None if dim == 64 else torch.randn(group, device=triton_device).to(dtype)
    query = torch.randn(3, group, dim).to(dtype).to(triton_device)
    states = torch.randn(2, 3, 1, 320, max(dim, width)).to(dtype)
    # Rows with arbitrary ranges, the last one empty; no part may read beyond them.
    start, end = [0, 7, 200], [315, 213, 200]
    slots = torch.arange(320)
    outside = torch.stack([(slots < a) | (slots >= b) for a, b in zip(start, end, strict=True)])
    states.masked_fill_(outside[:, None, :, None], torch.nan)
    keys, values = states.to(triton_device)[:, :, :, :315]
    keys, values = keys[..., :dim], values[..., :width]
    bounds = [torch.tensor(one, dtype=torch.int32, device=triton_device) for one in (start, end)]
    out = full_attention(query, keys, values, dim**-0.5, *bounds, softcap, sinks, "triton")
    assert out.dtype == dtype
    assert not bool(out[2].any())
    keys, values = keys.nan_to_num(), values.nan_to_num()
    everything = torch.arange(315, dtype=torch.int32, device=triton_device).expand(3, 1, 315)
    given = (everything, dim**-0.5, None, None, 1, *bounds, softcap, sinks)
    assert_attended(out, None, query, keys, values, *given)


def test_the_division_into_parts_does_not_change_the_result(triton_device: torch.device) -> None:
    from topkbench.kernels.full_attention import fused

    torch.manual_seed(0)
    query = torch.randn(1, 2, 16, device=triton_device)
    keys, values = torch.randn(2, 1, 1, 1100, 16, device=triton_device)
    keys[0, 0, 1095] = 5 * query[0, 0]  # the largest logit is in the last part
    expected = full_attention(query, keys, values, 1.0)
    for blocks in (fused.Blocks(programs=1), fused.Blocks(2**12, programs=6), fused.Blocks(2**15)):
        rest = (keys, values, 1.0, None, None, None, None, blocks)
        torch.testing.assert_close(
            fused.full_attention(query, *rest), expected, atol=1e-5, rtol=1e-5
        )
