"""Dropout, whatever a model calls it: modules, and rates that a module hands to a function."""

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

OF_ATTENTION = re.compile(
    r"(?=.*att)(?=.*drop).*", re.IGNORECASE
)  # in a config: attn_pdrop, attention_probs_dropout_prob


def find_dropout(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, float]]:
    """Yield each rate above zero: its module, its attribute, both by name, and the rate."""
    for path, module in model.named_modules():
        for name, rate in vars(module).items():
            named = name == "p" if isinstance(module, _DropoutNd) else "drop" in name
            if named and isinstance(rate, float) and rate > 0:
                yield module, name, f"{path}.{name}".strip("."), rate


def turn_off_dropout(model: nn.Module) -> None:
    """Set every rate to zero. TRL's `disable_dropout` (trl 1.16) does so for modules only."""
    for module, name, _, _ in list(find_dropout(model)):
        setattr(module, name, 0.0)


def attention_dropout(model: PreTrainedModel) -> tuple[str, float] | None:
    """Return the rate at which attention weights are dropped, by its name in the config; None where none are."""
    if next(find_dropout(model), None) is None:
        return None
    rates = model.config.get_text_config().to_dict().items()
    return next(((k, v) for k, v in rates if OF_ATTENTION.fullmatch(k) and isinstance(v, float) and v > 0), None)
