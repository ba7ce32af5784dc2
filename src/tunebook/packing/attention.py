"""Variable-length attention over one packed row, for every model that uses transformers' AttentionInterface.

The documents of a row are told apart by `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, which are
transformers' names and what TRL's padding-free collator returns. A document may have more keys than queries, its first
keys being another document's (`key_index`); it is causal from the lower right corner, as in flash-attn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from inspect import signature
from types import SimpleNamespace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available

from .context_parallel import ContextGroup
from .dropout import attention_dropout
from .heads import find_backbone

NAME = "varlen"
Scale = float | None
Lengths = tuple[Tensor, Tensor, int, int]  # of the documents, as flash-attn takes them
KEPT_APART = {"full_attention", "sliding_attention", "attention", "mlp", "moe"}  # types of layers in configs
OF_ITS_OWN = "does not go through transformers' AttentionInterface (ALiBi, say, or code of its own)"
TAKES_GROUPS = "enable_gqa" in signature(varlen_attn).parameters  # not before torch 2.12
_lengths = WeakTensorKeyDictionary()  # of the rows that are being run
OTHER = -1  # in place of a window: a mask that says more than which document a token is in, and its window


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
        attention_mask: for a packed row, its window, as `make_mask` has it; None where the model builds no mask.
        sliding_window: number of keys that a query sees, itself included; used where there is no mask.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2).
        cu_seq_lens_q, cu_seq_lens_k: (documents + 1,) int32, where the queries and the keys of each document start.
        key_index: (cu_seq_lens_k[-1],) the tokens that are each document's keys, one document after the other; None
            means that each document's keys are its own tokens.
        context: the ranks that share the row; `key_index` is then of the tokens of all.

    Returns:
        (1, tokens, heads, head_dim), and None in place of the attention weights.
    """
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:  # of `make_mask`
            raise ValueError(
                f"packing: {type(module).__name__} does not hand on which documents a packed row has, and every token "
                "would see all others. Set packing: false."
            )
        if softcap is None:
            given = (module, query, key, value, attention_mask, dropout, scaling)
            return sdpa_attention_forward(*given, **kwargs)  # type: ignore[arg-type]
        if attention_mask is None and (length := query.shape[2]) > 1:  # what sdpa calls is_causal
            key, value = key[:, :, :length], value[:, :, :length]
            attention_mask = _causal_mask(length, length, None, query.dtype, query.device) == 0
        return _softcap_attention(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None

    sliding_window = _read_window(module, attention_mask, sliding_window, dropout)
    if query.is_cuda and query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        # Rotary embeddings leave float32 under autocast, which no flash kernel takes
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))

    assert cu_seq_lens_k is not None and max_length_q is not None and max_length_k is not None
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    flash = query.is_cuda and takes_flash(query, torch.cuda.get_device_capability(query.device))
    flash = flash and (softcap is None or is_flash_attn_2_available())
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


def _read_window(module: nn.Module, mask: Tensor | None, window: int | None, dropout: float) -> int | None:
    """Return the window of a packed row: its mask's, since not every model hands the window on to its attention."""
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"packing: {name} drops attention weights ({dropout}), which variable-length attention lacks. Turn it off "
            "by model_init_kwargs, or set packing: false."
        )
    _row.attended = True
    if mask is not None:
        window = (int(mask) if mask.numel() == 1 else OTHER) or None
    if window == OTHER:
        raise ValueError(
            f"packing: {name} does not attend causally, by its config (is_causal, is_decoder, "
            "use_bidirectional_attention), or masks more than that. Set packing: false."
        )
    return window


def takes_flash(query: Tensor, capability: tuple[int, int]) -> bool:
    """Return whether flash kernels take a query: in half precision, with heads of 256 at most, from Ampere on (compute
    capability 8.0). Else each document is attended to on its own."""
    return query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256 and capability >= (8, 0)


def pad_heads(*rows: Tensor) -> list[Tensor]:
    """Fill the heads of query, key and value, (..., head_dim), with zeros to one width, a multiple of 8, as flash
    kernels need it. Values are narrower than queries in multi-head latent attention. The output's first dimensions are
    what they would be, with the scale of the narrow heads."""
    width = -(-max(x.shape[-1] for x in rows) // 8) * 8
    return [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in rows]


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scaling: Scale, window: int | None, softcap: Scale
) -> Tensor:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    width = value.shape[-1]
    query, key, value = (x[0].transpose(0, 1) for x in pad_heads(query, key, value))
    sides = (-1 if window is None else window - 1, 0)
    if is_flash_attn_2_available():
        from flash_attn import flash_attn_varlen_func

        cap = 0.0 if softcap is None else softcap
        output = flash_attn_varlen_func(
            *(query, key, value, *lengths),
            softmax_scale=scaling,
            causal=True,
            window_size=sides,
            softcap=cap,
            deterministic=torch.are_deterministic_algorithms_enabled(),  # torch's kernel looks by itself
        )
    elif TAKES_GROUPS:
        output = varlen_attn(query, key, value, *lengths, scale=scaling, window_size=sides, enable_gqa=True)
    else:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        output = varlen_attn(query, key, value, *lengths, scale=scaling, window_size=sides)
    return cast(Tensor, output)[None, ..., :width]


def document_lengths(starts: Tensor) -> list[int]:
    """Return the tokens of each document from where they start, (documents + 1,). They are read once for all layers,
    since a GPU has to be waited for."""
    if starts not in _lengths:
        _lengths[starts] = starts.diff().tolist()
    return cast(list[int], _lengths[starts])


def _document_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scaling: Scale, window: int | None, softcap: Scale
) -> Tensor:
    q_lengths, k_lengths = map(document_lengths, lengths[:2])
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


_row = SimpleNamespace(packed=False, attended=False)


@contextmanager
def packed_row() -> Iterator[None]:
    """Say that the row which a model runs inside is packed, so that no mask of tokens x tokens is built."""
    _row.packed, _row.attended = True, False
    try:
        yield
        if not _row.attended:
            raise ValueError(f"packing: the model has attention that {OF_ITS_OWN}. Set packing: false.")
    finally:
        _row.packed = False


def make_mask(*args: object, local_size: int | None = None, use_vmap: bool = False, **kwargs: object) -> Tensor | None:
    """Return the mask that transformers' functions ask for. For a packed row it is (1, 1, 1, 1), on the CPU, and has
    the size of the sliding window, 0 for none, or `OTHER` for what is not causal or adds to a causal mask."""
    if not _row.packed:
        given = {**kwargs, "local_size": local_size, "use_vmap": use_vmap}
        return sdpa_mask(*args, **given)  # type: ignore[arg-type]
    other = use_vmap or "allow_is_bidirectional_skip" in kwargs
    return torch.full((1, 1, 1, 1), OTHER if other else local_size or 0, device="cpu")


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, make_mask)


def set_varlen_attention(model: PreTrainedModel) -> None:
    """Make `model` attend with `varlen_attention`.

    Raises:
        ValueError: what the model does cannot be done by a kernel that gets documents instead of a mask.
    """
    if reason := _find_obstacle(model):
        raise ValueError(f"packing: {type(model).__name__} {reason}. Set packing: false.")
    if model.config._attn_implementation != NAME:
        vars(model)["unpacked_attention"] = model.config._attn_implementation
    model.set_attn_implementation(NAME)


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend as it did before `set_varlen_attention`, where that was called."""
    packs = model.config._attn_implementation == NAME
    if packs:
        model.set_attn_implementation(vars(model)["unpacked_attention"])
    try:
        yield
    finally:
        if packs:
            model.set_attn_implementation(NAME)


def _find_obstacle(model: PreTrainedModel) -> str | None:
    config = model.config.to_dict()
    if model.config.get_text_config() is not model.config:
        return "takes more than text, which packing would misplace"
    layers = set(config.get("layer_types") or config.get("layers_block_type") or ())
    other_layers = sorted(layers - KEPT_APART)
    if other_layers or (model._is_stateful and not layers):
        kinds = ", ".join(other_layers) or "state space, linear attention"
        return (
            f"has layers that carry a state or mix tokens otherwise than causal attention does ({kinds}): documents in "
            "one row would see each other"
        )
    if found := attention_dropout(model):
        off = f"model_init_kwargs: {{{found[0]}: 0.0}} turns it off"
        return f"has an {found[0]} of {found[1]}, which variable-length attention lacks ({off})"
    if not model._can_set_attn_implementation():
        return f"has attention that {OF_ITS_OWN}"
    if any("sink" in name for name, _ in model.named_parameters()):
        return "has attention sinks, which this attention lacks"
    backbone = find_backbone(model)
    if "position_ids" not in signature(backbone.forward).parameters:
        return "takes no position_ids, and those of a packed row begin anew with each document"
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return "counts positions from its pad token, and those of a packed row from each document's start"
    return None
