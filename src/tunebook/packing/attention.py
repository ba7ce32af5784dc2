"""Variable-length attention over one packed row, for every model that uses transformers' AttentionInterface.

The documents of a row are told apart by `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, which are
transformers' names and what TRL's padding-free collator returns. A document may have more keys than queries, its first
keys being another document's (`key_index`); it is causal from the lower right corner, as in flash-attn.
"""

from functools import lru_cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available

from .context_parallel import ContextGroup

NAME = "varlen"
Scale = float | None
Lengths = tuple[Tensor, Tensor, int, int]  # of the documents, as flash-attn takes them
Arguments = tuple[tuple[object, ...], dict[str, object]]  # of a forward


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_index: Tensor | None = None,
    context: ContextGroup | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend from each document of a packed row to itself, causally; like transformers' `sdpa` where no documents are
    given (generation, padded batches).

    Args:
        query: (1, heads, tokens, head_dim); key, value: (1, key_value_heads, tokens, head_dim).
        attention_mask: ignored for a packed row.
        sliding_window: number of keys that a query sees, itself included.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2).
        cu_seq_lens_q, cu_seq_lens_k: (documents + 1,) int32, where the queries and the keys of each document start.
        key_index: (cu_seq_lens_k[-1],) the tokens that are each document's keys, one document after the other; None
            means that each document's keys are its own tokens.
        context: the ranks that share the row; `key_index` is then of the tokens of all.

    Returns:
        (1, tokens, heads, head_dim), and None in place of the attention weights.
    """
    if cu_seq_lens_q is None:
        if softcap is None:
            given = (module, query, key, value, attention_mask, dropout, scaling)
            return sdpa_attention_forward(*given, **kwargs)  # type: ignore[arg-type]
        if attention_mask is None and (length := query.shape[2]) > 1:  # what sdpa calls is_causal
            key, value = key[:, :, :length], value[:, :, :length]
            attention_mask = _causal_mask(length, length, None, query.dtype, query.device) == 0
        return _softcap_attention(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None

    if query.is_cuda and query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        # Rotary embeddings leave float32 under autocast, which no flash kernel takes
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))

    assert cu_seq_lens_k is not None and max_length_q is not None and max_length_k is not None
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    flash = half and (softcap is None or is_flash_attn_2_available())
    attend = partial(
        _flash_attention if flash else _document_attention,
        lengths=lengths,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    if context is not None:
        return context.attend(attend, query, key, value, key_index), None
    if key_index is not None:
        key, value = key.index_select(2, key_index), value.index_select(2, key_index)
    return attend(query, key, value), None


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scaling: Scale, window: int | None, softcap: Scale
) -> Tensor:
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    sides = (-1 if window is None else window - 1, 0)
    if is_flash_attn_2_available():
        from flash_attn import flash_attn_varlen_func

        cap = 0.0 if softcap is None else softcap
        return flash_attn_varlen_func(
            query, key, value, *lengths, softmax_scale=scaling, causal=True, window_size=sides, softcap=cap
        )[None]
    output = varlen_attn(query, key, value, *lengths, scale=scaling, window_size=sides, enable_gqa=True)
    return cast(Tensor, output)[None]


def _document_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scaling: Scale, window: int | None, softcap: Scale
) -> Tensor:
    q_lengths, k_lengths = (starts.diff().tolist() for starts in lengths[:2])
    outputs = []
    # split, as the backward of a slice writes a whole row
    for document in zip(query.split(q_lengths, 2), key.split(k_lengths, 2), value.split(k_lengths, 2), strict=True):
        queries, keys = document[0].shape[2], document[1].shape[2]
        full = queries == keys and (window is None or keys <= window)
        mask = None if full and softcap is None else _causal_mask(queries, keys, window, query.dtype, query.device)
        if softcap is None:
            output = F.scaled_dot_product_attention(
                *document, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        else:
            seen = None if mask is None else mask == 0
            output = _softcap_attention(*document, seen, scaling, softcap)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


@lru_cache(maxsize=4)  # the few pieces of a long row are the same in all heads and layers, and each keeps its mask
@torch.inference_mode(mode=False)  # one that scoring made serves training
def _causal_mask(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(queries, keys), 0 where a query sees a key, else -inf; the last query is aligned with the last key."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if window is not None:
        seen = seen.triu(keys - queries - window + 1)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _softcap_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: Scale, softcap: float
) -> Tensor:
    assert scaling is not None
    groups = query.shape[1] // key.shape[1]
    scores = query @ repeat_kv(key, groups).transpose(2, 3) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ repeat_kv(value, groups)


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def set_varlen_attention(model: PreTrainedModel) -> RemovableHandle:
    """Make `model` attend with `varlen_attention`, and return the handle of the hook that gives packed rows no mask.

    Raises:
        ValueError: what the model does cannot be done by a kernel that gets documents instead of a mask.
    """
    if reason := _find_obstacle(model):
        raise ValueError(f"packing: {type(model).__name__} {reason}. Set packing: false.")
    model.set_attn_implementation(NAME)
    return model.base_model.register_forward_pre_hook(_drop_mask, with_kwargs=True)


def _find_obstacle(model: PreTrainedModel) -> str | None:
    config = model.config.to_dict()
    if model.config.get_text_config() is not model.config:
        return "takes more than text, which packing would misplace"
    other_layers = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if model._is_stateful or other_layers:
        kinds = ", ".join(sorted(other_layers)) or "state space, linear attention"
        return (
            f"has layers that carry a state or mix tokens otherwise than causal attention does ({kinds}): documents in "
            "one row would see each other"
        )
    # transformers' flags say that attention goes through AttentionInterface, and that documents say all there is to
    # know: no ALiBi, no positions counted from the mask, no mask that a layer computes
    if not (model._supports_attention_backend and model._supports_flash_attn):
        return "does not support variable-length attention: its positions (ALiBi) or masks are for one document per row"
    if not model._supports_sdpa and "attn_logit_softcapping" not in config:
        return "has attention sinks, which this attention lacks"
    for name in ("attention_dropout", "attn_pdrop"):
        if config.get(name):
            off = f"model_init_kwargs: {{{name}: 0.0}} turns it off"
            return f"has an {name} of {config[name]}, which variable-length attention lacks ({off})"
    return None


def _drop_mask(backbone: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
    # PATCH(transformers<5.25): without a mask transformers builds one of tokens x tokens from a packed row's positions,
    # and it takes a 4-D mask as it is. Waits for transformers/masking_utils.py:735. Delete when an attention function
    # can ask for none.
    if kwargs.get("cu_seq_lens_q") is not None:
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return args, kwargs
