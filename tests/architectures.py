"""Every causal language model of transformers, tiny: `python tests/architectures.py` writes docs/models.md."""

import copy
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from conftest import read_cases
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import add_fused_lm_head

from tunebook.packing import pack_causal_lm, pack_reward_model
from tunebook.packing.dropout import turn_off_dropout
from tunebook.packing.heads import experts_per_token, has_routers
from tunebook.training.proof import Proof, measure

CASES = read_cases("architectures.yaml")
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
LAYOUTS = {"unpacked": (False, False), "packed": (True, False), "shared": (True, True)}
TASKS = {"SFT, DPO": AutoModelForCausalLM, "RM": AutoModelForSequenceClassification}

# Two pairs: chosen and rejected of each start alike, and are of different lengths, longer than the window of 8
PROMPTS = [[5, 6, 7, 8, 9], [30, 31, 32]]
ANSWERS = [[11, 12, 13, 14, 15, 16, 17, 18, 20, 2], [33, 34, 35, 2], [21, 22, 2], [*range(36, 47), 2]]
ROWS = [PROMPTS[i % 2] + answer for i, answer in enumerate(ANSWERS)]
LENGTH = max(map(len, ROWS))
BATCH = {
    "input_ids": torch.tensor([row + [0] * (LENGTH - len(row)) for row in ROWS]),
    "attention_mask": torch.tensor([[1] * len(row) + [0] * (LENGTH - len(row)) for row in ROWS]),
    "use_cache": False,
}
LABELS = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100)
for i in range(len(ROWS)):
    LABELS[i, : len(PROMPTS[i % 2])] = -100
WEIGHTS = torch.randn(len(ROWS), LENGTH - 1, generator=torch.Generator().manual_seed(1))


def tiny_config(config_class: type, particular: dict) -> PreTrainedConfig:
    """The config of a tiny model, its text part's included."""
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in CASES["sizes"].items() if name in names}
    for name, part in config_class.sub_configs.items():
        if dataclasses.is_dataclass(part) and (name in particular or name == "text_config"):
            values[name] = tiny_config(part, particular.get(name, {})).to_dict()
    own = {
        name: value for name, value in particular.items() if name not in config_class.sub_configs or name not in values
    }
    return config_class(**values | own)


def build_tiny(name: str, architecture: type = AutoModelForCausalLM) -> PreTrainedModel:
    """A random model of an architecture, without dropout. Its matrices are large, so that what is wrong shows."""
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[name], CASES["particular"].get(name, {}))
    config.num_labels = 1 if architecture is AutoModelForSequenceClassification else 2
    config.get_text_config().pad_token_id = 0
    model = architecture.from_config(copy.deepcopy(config)).eval()
    turn_off_dropout(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def own_outputs(model: PreTrainedModel, rewards: bool) -> torch.Tensor:
    """What the model's own forward gives, one row at a time, without padding."""
    outputs = []
    for row, labels in zip(ROWS, LABELS, strict=True):
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
        if not rewards:
            log_probs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            logits = F.pad(log_probs, (0, LENGTH - len(row))) * (labels[1:] != -100)
        outputs.append(logits)
    return torch.stack(outputs)


def own_balance(model: PreTrainedModel) -> torch.Tensor:
    """The load-balancing loss of the padded batch: the model's own, or Mixtral's where it has none."""
    if "load_balancing_loss_func" in vars(sys.modules[type(model).__module__]):
        return model(**BATCH, output_router_logits=True).aux_loss
    logits = model.base_model(**BATCH, output_router_logits=True).router_logits
    per_token = experts_per_token(model.config.to_dict())
    layers = tuple(layer.reshape(-1, layer.shape[-1]) for layer in logits)
    return load_balancing_loss_func(layers, layers[0].shape[-1], per_token, BATCH["attention_mask"])


def trained_outputs(model: nn.Module, rewards: bool) -> torch.Tensor:
    """What the forward gives that trains."""
    return model(**BATCH).logits if rewards else model(**BATCH, labels=LABELS, fused_lm_head=True).log_probs


def gradients(model: nn.Module, outputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (outputs * WEIGHTS[:, : outputs.shape[1]]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differs(outputs: torch.Tensor, grads: dict, expected: torch.Tensor, expected_grads: dict) -> bool:
    """Whether an output is off by 1e-4, or a gradient by 1e-3 of its largest element."""
    largest = max(grad.abs().max() for grad in expected_grads.values())
    scales = {name: max(grad.abs().max(), largest / 100) for name, grad in expected_grads.items()}
    wrong = [
        name
        for name, g in expected_grads.items()
        if name not in grads or (grads[name] - g).abs().max() > 1e-3 * scales[name]
    ]
    return bool((outputs - expected).abs().max() > 1e-4 or wrong)


def outcome(name: str, task: str, layout: str) -> str:
    """`yes`, or the reason of a refusal; an AssertionError where the numbers are wrong."""
    rewards, (packing, share_prefix) = task == "RM", LAYOUTS[layout]
    model = build_tiny(name, TASKS[task])
    expected = own_outputs(model, rewards)
    expected_grads = {name: grad.clone() for name, grad in gradients(model, expected).items()}
    balance = None if rewards or not has_routers(model) else own_balance(model)
    pack: Callable = pack_reward_model if rewards else pack_causal_lm
    try:
        if not rewards:
            add_fused_lm_head(model)
        pack(model, packing, share_prefix)
        outputs = trained_outputs(model, rewards)
        grads = gradients(model, outputs)
        if balance is not None:
            routed = model(**BATCH, labels=LABELS, fused_lm_head=True, output_router_logits=True)
            torch.testing.assert_close(routed.aux_loss, balance, rtol=1e-5, atol=1e-5, msg=f"{name}: balancing loss")
        tokens = torch.tensor([3, *range(5, 27)])
        proof = Proof(name, rewards, packing, False, *measure(model, model, tokens, 0, rewards, False).tolist())
        proof.judge()
    except ValueError as error:
        return str(error)
    assert not differs(outputs.detach(), grads, expected.detach(), expected_grads), f"{name}: {task}, {layout}"
    return "yes"


def lora_targets(name: str) -> str:
    """`all-linear`, if every one of its matrices gets a gradient; else which do not, or which PEFT does not take."""
    model = build_tiny(name)
    add_fused_lm_head(model)
    pack_causal_lm(model, packing=False)
    try:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    except ValueError as error:
        return "not " + ", ".join(sorted(set(re.findall(r"'(\w+)'", str(error).partition("{")[2]))))
    try:
        grads = gradients(model, trained_outputs(model, rewards=False))
    except (RuntimeError, AttributeError):  # a router that is a linear layer with another output, or parts of one
        return "not all-linear"
    silent = {n.split(".lora_B")[0].split(".")[-1] for n, g in grads.items() if ".lora_B" in n and not g.abs().max()}
    return "all-linear" if not silent else "not " + ", ".join(sorted(silent))


def table_row(name: str) -> str:
    """An architecture's row of docs/models.md."""
    marks, reasons = [], []
    for task in TASKS:
        known = task != "RM" or name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        for layout in LAYOUTS:
            reason = outcome(name, task, layout) if known else ""
            marks.append({"": "", "yes": "yes"}.get(reason, "no"))
            reasons += [reason.replace("|", "\\|")] if marks[-1] == "no" and reason not in reasons else []
    return (
        "| "
        + " | ".join([f"`{name}`", *marks, lora_targets(name) if marks[0] == "yes" else "", " ".join(reasons)])
        + " |"
    )


HEAD = """# Models

What `python tests/architectures.py` measured: each text architecture among the causal language models of transformers
{version}, built tiny with random weights, in float32 on a CPU. Log-probabilities, rewards and gradients of two pairs of
different lengths are compared with the model's own logits, one row at a time and without padding. "yes" is equal to
1e-4, "no" is refused, for the reason at the end; nothing else came out. "Packed" is `packing: true`, "shared" is
`share_prefix: true`. An empty field: transformers has no reward model of that architecture. Dropout is off, as
`disable_dropout` has it in DPO and reward models.

LoRA: what `lora_target_modules: [all-linear]` trains; after "not", the layers that get no gradient, or that PEFT does
not take. Experts are not linear layers: name them in `lora_target_parameters`.

A model that is not here, remote code among them, is proven at the start of each run (`verify_model`).

| architecture | SFT, DPO | packed | shared | RM | packed | shared | LoRA | why not |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def page(rows: list[str]) -> str:
    """docs/models.md."""
    missing = [f"- `{name}` {reason}." for name, reason in CASES["not_built"].items()]
    head = HEAD.format(version=".".join(transformers.__version__.split(".")[:2]))
    return head + "\n".join(rows) + "\n\nNot built:\n\n" + "\n".join(missing) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page([table_row(name) for name in NAMES if name not in CASES["not_built"]]))
