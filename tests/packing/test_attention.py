"""The variable-length attention against a dense attention in float64, and the models that it refuses."""

import sys
import types

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tunebook.packing import attention
from tunebook.packing.attention import set_varlen_attention, takes_flash, varlen_attention

SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def dense_attention(query, key, value, seen, scaling, softcap):
    """(heads, tokens, head_dim), one query after the other, in float64."""
    groups = query.shape[0] // key.shape[0]
    output = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(query.shape[0]):
        for token in range(query.shape[1]):
            keys = key[head // groups, seen[token]].double()
            scores = keys @ query[head, token].double() * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            output[head, token] = torch.softmax(scores, 0) @ value[head // groups, seen[token]].double()
    return output


def row_lengths(queries: list[int], keys: list[int]) -> dict:
    """A row of documents with these numbers of queries and keys, as attention takes it."""
    ends = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    starts = dict(cu_seq_lens_q=ends[0], cu_seq_lens_k=ends[1])
    return dict(**starts, max_length_q=max(queries), max_length_k=max(keys))


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=4),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    window=st.sampled_from([None, 1, 3, 50]),
    softcap=st.sampled_from([None, 2.0]),
    scaling=st.sampled_from([0.3, 1.0]),
)
def test_each_token_sees_its_document_and_the_keys_lent_to_it(documents, heads, window, softcap, scaling):
    """`documents`: own tokens, and how many of the row's first tokens come before them as keys."""
    torch.manual_seed(0)
    tokens = sum(own for own, _ in documents)
    query = torch.randn(1, heads[0], tokens, 4)
    key, value = torch.randn(2, 1, heads[1], tokens, 4)
    key_index, seen, start = [], [], 0
    for own, lent in documents:
        keys = list(range(min(lent, start)))  # the row's first tokens
        for token in range(start, start + own):
            keys = [*keys, token]
            seen.append(keys[-window:] if window else keys)
        key_index.append(keys)
        start += own
    lengths = row_lengths([own for own, _ in documents], [len(keys) for keys in key_index])
    options = dict(scaling=scaling, sliding_window=window, softcap=softcap, key_index=torch.tensor(sum(key_index, [])))
    output, _ = varlen_attention(nn.Identity(), query, key, value, None, **options, **lengths)
    expected = dense_attention(query[0], key[0], value[0], seen, scaling, softcap)
    torch.testing.assert_close(output[0].transpose(0, 1).double(), expected, rtol=1e-5, atol=1e-5)


def packed_row(device="cpu", dtype=torch.float32, width=64, value_width=64):
    """Two documents, the second with three of the first one's keys; eight query heads and two key heads."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 8, 16, width), torch.randn(1, 2, 16, width)
    index = torch.tensor([*range(10), 0, 1, 2, *range(10, 16)])
    tensors = dict(query=query, key=key, value=torch.randn(1, 2, 16, value_width))
    tensors = {name: x.to(device, dtype).requires_grad_() for name, x in tensors.items()}
    lengths = row_lengths([10, 6], [10, 9]) | dict(key_index=index)
    lengths = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in lengths.items()}
    return tensors, dict(module=nn.Identity(), attention_mask=None, **lengths)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("widths", [(64, 64), (60, 60), (24, 16), (16, 24)], ids=str)
@pytest.mark.parametrize("kernel", ["flash-attn", "torch", "torch 2.11"])
def test_the_kernels_are_told_what_the_loop_over_documents_does(kernel, widths, window, monkeypatch):
    """The kernels by their documentation: (tokens, heads, head_dim) of one width, a multiple of 8, keys to the left,
    causal from the lower right."""

    def documented(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] and not query.shape[-1] % 8
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max()) and window_size[1] == 0
        seen = []
        for q_start, q_end, k_start, k_end in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            for left in range(q_end - q_start - 1, -1, -1):
                last = int(k_end) - left
                first = k_start if window_size[0] < 0 else max(int(k_start), last - 1 - window_size[0])
                seen.append(list(range(first, last)))
        heads = [x.detach().transpose(0, 1) for x in (query, key, value)]
        return dense_attention(*heads, seen, scale, None).transpose(0, 1).float()

    def flash_attn_varlen_func(*rows, softmax_scale, causal, window_size, softcap, deterministic):
        assert causal and softcap == 0 and deterministic == torch.are_deterministic_algorithms_enabled()
        return documented(*rows, softmax_scale, window_size)

    def varlen_attn(*rows, scale, window_size, enable_gqa=False):
        assert enable_gqa == (kernel == "torch") and (enable_gqa or rows[0].shape[1] == rows[1].shape[1])
        return documented(*rows, scale, window_size)

    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: kernel == "flash-attn")
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "TAKES_GROUPS", kernel == "torch")
    fake = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    tensors, arguments = packed_row(width=widths[0], value_width=widths[1])
    scaling = 0.2 if window else None  # None: by the width of the heads
    expected, _ = varlen_attention(**tensors, **arguments, scaling=scaling, sliding_window=window)
    monkeypatch.setattr(attention, "_document_attention", attention._flash_attention)
    output, _ = varlen_attention(**tensors, **arguments, scaling=scaling, sliding_window=window)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "takes"),
    [
        (torch.bfloat16, 256, (8, 0), True),
        (torch.float16, 64, (9, 0), True),
        (torch.float32, 64, (9, 0), False),
        (torch.bfloat16, 512, (9, 0), False),
        (torch.float16, 64, (7, 5), False),
    ],
)
def test_flash_kernels_get_what_they_take(dtype, width, capability, takes):
    assert takes_flash(torch.empty(1, 1, 1, width, dtype=dtype), capability) == takes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the CUDA kernels with the CPU: no GPU here")
@pytest.mark.parametrize("window", [None, 4])
def test_cuda_equals_the_cpu(window):
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        tensors, arguments = packed_row(device, dtype)
        output, _ = varlen_attention(**tensors, **arguments, scaling=0.1, sliding_window=window)
        gradients = torch.autograd.grad(output.float().square().sum(), list(tensors.values()))
        results.append([x.float().cpu() for x in (output, *gradients)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_padded_batches_and_generation_are_what_they_were(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, num_key_value_heads=1, head_dim=8, pad_token_id=0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids, mask = torch.randint(1, 64, (2, 7)), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])

    def outputs():
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        return logits, model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)

    logits, generated = outputs()
    set_varlen_attention(model)
    patched_logits, patched_generated = outputs()
    real = mask.bool()
    torch.testing.assert_close(patched_logits[real], logits[real], rtol=1e-5, atol=1e-6)
    assert torch.equal(patched_generated, generated)


def test_the_attention_is_not_written_into_a_checkpoint(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    set_varlen_attention(model)
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()


EXPERTS = dict(num_experts=2, num_local_experts=2, num_experts_per_tok=1, num_key_value_heads=1, head_dim=8)
EXPERTS |= dict(moe_intermediate_size=8, shared_expert_intermediate_size=8)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("MambaForCausalLM", dict(state_size=4), "state space"),
        (
            "Qwen3NextForCausalLM",
            EXPERTS | dict(layer_types=["linear_attention", "full_attention"]),
            "linear_attention",
        ),
        ("Lfm2ForCausalLM", dict(layer_types=["conv", "full_attention"], num_key_value_heads=1), "conv"),
        ("BloomForCausalLM", dict(n_head=2, n_layer=1), "ALiBi"),
        ("GptOssForCausalLM", EXPERTS, "attention sinks"),
        ("LlamaForCausalLM", dict(attention_dropout=0.1), "attention_dropout of 0.1"),
        ("GPT2LMHeadModel", dict(n_head=2, n_layer=1), "attn_pdrop of 0.1"),
    ],
)
def test_a_model_that_packing_would_change_is_refused_by_name(name, changes, reason):
    model_class = getattr(transformers, name)
    with pytest.raises(ValueError, match=f"packing: {name}.*{reason}.*packing: false"):
        set_varlen_attention(model_class(model_class.config_class(**SIZES | changes)))


def test_a_mask_that_was_made_while_scoring_serves_training():
    """Masks are kept, and autograd refuses tensors of inference mode."""
    attention._causal_mask.cache_clear()
    rows = [torch.randn(1, 1, tokens, 8, requires_grad=True) for tokens in (2, 4, 4)]
    lengths = row_lengths([2], [4])
    with torch.inference_mode():
        varlen_attention(nn.Module(), *rows, None, **lengths)
    varlen_attention(nn.Module(), *rows, None, **lengths)[0].sum().backward()
    assert rows[0].grad.abs().sum() > 0
