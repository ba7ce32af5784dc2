"""What keys may be and need, and which contradict each other: checked before a model or data is loaded."""

import difflib
import re
from collections.abc import Iterator
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from annotated_types import Interval
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from ..environment import fsdp_state_dict_type, fsdp_version, launched_sharding, offloads_fsdp, uses_fsdp
from ..errors import brief, plain
from ..files import read_yaml
from .needs import Values, holds, is_benchmark

if TYPE_CHECKING:
    from transformers import TrainingArguments

RULES = read_yaml(Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8"), "rules.yaml")
# Key -> what the number may be, and (key, condition), of TRL's and transformers' keys
RANGES = {
    name: Interval(**{limit: bound for limit, bound in rule.items() if limit != "keys"})
    for rule in RULES["ranges"]
    for name in rule["keys"].split()
}
CHOICES = {name: tuple(words.split()) for name, words in RULES["choices"].items()}
NEEDS = [(name, rule["need"].replace("{key}", name)) for rule in RULES["needs"] for name in rule["keys"].split()]


# What git check-ref-format takes, and refs/, which the Hub keeps for itself
BRANCH = re.compile(
    r"(?!-|refs/)(?!.*(\.\.|//|@\{|\.lock(/|$)|(^|/)\.))"  # no part begins with a dot or ends in .lock
    r"[^\x00-\x20\x7f~^:?*\[\\/][^\x00-\x20\x7f~^:?*\[\\]*(?<![./])"
)


def contradictions(v: Values) -> Iterator[str]:
    """Yield what is wrong with the keys in combination, a message each."""
    yield from (rule["message"] for rule in RULES["contradictions"] if holds(rule["if"], v))
    yield from mixture_contradictions(v)
    if v["prompt_template"] is not None and not re.search(r"\{\w*\}", v["prompt_template"]):
        yield "`prompt_template` has no place for a prompt. Add {} for the prompt column, or {name} for a column."
    if v["test_split_size"] is not None and v["test_split_size"] >= 1 and v["test_split_size"] % 1:
        yield "`test_split_size` is neither a fraction below 1 nor a whole number of rows. Set one of them."
    if is_benchmark(v["metric_for_best_model"]) and v.get("benchmark_schedule") in ("after", "beside"):
        yield "`metric_for_best_model` is a benchmark's score. Set `benchmark_schedule: evaluation`."
    smoothed = holds("loss_type: robust, exo_pair, aot or aot_unpaired", v)
    if v.get("label_smoothing") and holds("loss_type: sigmoid", v) and smoothed:
        yield "`label_smoothing` is one value in TRL, but two of the losses read it differently. Leave one loss out."
    if v.get("loss_weights") is not None and len(v["loss_weights"]) != len(v["loss_type"]):
        yield f"`loss_weights` has {len(v['loss_weights'])} weights, `loss_type` {len(v['loss_type'])}. Give each one."
    if (v.get("liger_kernel_config") or {}).get("fused_linear_cross_entropy"):
        yield "`liger_kernel_config`: fused_linear_cross_entropy would replace the head that scores labels. Remove it."
    if v["optim_args"] and not all(re.fullmatch(r"\s*\w+=[^=]+", part) for part in v["optim_args"].split(",")):
        yield f"`optim_args` {brief(v['optim_args'])} is not of the form name=value,name=value. Write it so."
    yield from schedule_contradictions(v)
    yield from interval_contradictions(v)
    yield from metric_contradictions(v)
    yield from hub_contradictions(v)


def schedule_contradictions(v: Values) -> Iterator[str]:
    schedule, given = SchedulerType(v["lr_scheduler_type"]), v["lr_scheduler_kwargs"]
    parameters = signature(TYPE_TO_SCHEDULER_FUNCTION[schedule]).parameters  # type: ignore[arg-type]
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    taken = parameters.keys() - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    if isinstance(given, dict) and not takes_any and (unknown := given.keys() - taken):
        yield (
            f"`lr_scheduler_kwargs`: {schedule.value} has no {', '.join(sorted(map(str, unknown)))}. It takes "
            f"{', '.join(sorted(taken)) or 'nothing'}; or set another `lr_scheduler_type`."
        )


def interval_contradictions(v: Values) -> Iterator[str]:
    for name in ("save_steps", "eval_steps", "logging_steps"):
        if (v[name] or 0) > 1 and v[name] % 1:
            yield f"`{name}` {v[name]} is neither a share of the steps below 1 nor a whole number. Set one of them."
    save, evaluate = v["save_steps"], v["eval_steps"] or v["logging_steps"]
    both = holds("load_best_model_at_end and save_strategy: steps and eval_strategy: steps", v)
    if both and (save < 1) != (evaluate < 1):
        yield "`load_best_model_at_end`: `save_steps` and `eval_steps` are a share and a number. Set both in one way."
    elif both and round(save * 1e6) % round(evaluate * 1e6):
        yield (
            "`load_best_model_at_end` needs an evaluation at each checkpoint, which save_steps skips. "
            f"Set `save_steps: {evaluate:g}`, or a multiple of it."
        )


def metric_contradictions(v: Values) -> Iterator[str]:
    """Yield why no evaluation can have the metric for the best model."""
    metric = v["metric_for_best_model"]
    name, known = (metric or "loss").removeprefix("eval_"), RULES["metrics"]
    if is_benchmark(metric):
        key = "pair_benchmarks" if v["task"] == "rm" else "benchmarks"
        if not v[key]:
            yield f"`metric_for_best_model` {metric} is a benchmark's score. Set `{key}`, or another metric."
    elif v["callbacks"] or v.get("eval_metrics") or (name.startswith("accuracy_") and v.get("subset_column")):
        return
    elif name not in (names := f"{known[v['task']]} {known['all']}".split()):
        near = difflib.get_close_matches(name, names, n=1) or names[:1]
        yield (
            f"`metric_for_best_model` {plain(metric, 200)}: no evaluation of this recipe has it. Did you mean "
            f"eval_{near[0]}? There are {', '.join(names)}."
        )


def hub_contradictions(v: Values) -> Iterator[str]:
    """Yield what the Hub, or git behind it, would not take as the name of a repository or a branch."""
    repo_id, revision = v["hub_model_id"], v["hub_revision"]
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            yield f"`hub_model_id` is not a name on the Hub: {plain(error, 200)}"
        else:
            if v["push_to_hub_revision"] and "/" not in repo_id:
                yield f"`hub_model_id` {repo_id} has no owner. Write owner/{repo_id}."
    if revision is not None and not BRANCH.fullmatch(revision):
        yield f"`hub_revision` {brief(revision)} cannot be a branch on the Hub. Use letters, digits, '-', '_' and '.'."


def mixture_contradictions(v: Values) -> Iterator[str]:
    sources = v["datasets"] or []
    probabilities, fractions = ([vars(source)[name] for source in sources] for name in ("probability", "fraction"))
    for name, shares in (("probability", probabilities), ("fraction", fractions)):
        if len({share is None for share in shares}) > 1:
            yield f"`datasets`: `{name}` is set for some entries. Set it for every entry or for none."
        elif any(share is not None and share <= 0 for share in shares):
            yield f"`datasets`: a `{name}` is not above 0. Leave out an entry that is not wanted."
    mixed = any(share is not None for share in probabilities)
    if mixed and any(share is not None for share in fractions):
        yield "`datasets`: `probability` and `fraction` are two ways to mix. Set one of them."
    if mixed and not 0.999 < sum(share or 0 for share in probabilities) < 1.001:
        yield "`datasets`: the probabilities do not add up to 1. Change one."
    if v["mixture_stopping"] != "first_exhausted" and not mixed:
        yield "`mixture_stopping` has no effect here. It needs a probability for every entry of `datasets`."


def check_fsdp_device() -> None:
    """Refuse FSDP without an accelerator.

    Raises:
        ValueError: there is none.
    """
    if not torch.accelerator.is_available():
        # accelerate 1.15 (state.py, line 220) lists GPU types only and silently gives DDP elsewhere
        raise ValueError("FSDP needs a GPU. On a CPU accelerate would run DDP: launch with ddp.yaml or zero3.yaml.")


def check_fsdp(args: "TrainingArguments") -> None:
    """Refuse what FSDP cannot save or train.

    Raises:
        ValueError: for a state dict in shards, which the Trainer saves no model from, and an optimizer that cannot take
            sharded parameters.
    """
    if (kind := fsdp_state_dict_type()) != "FULL_STATE_DICT":
        raise ValueError(f"Under fsdp_state_dict_type: {kind} no model is saved. Set FULL_STATE_DICT in its place.")
    if fsdp_version() == 2 and args.optim == "adafactor":
        raise ValueError("`optim: adafactor` cannot train the shards of FSDP2. Launch with zero3.yaml, or set another.")


def check_muon(args: "TrainingArguments") -> None:
    """Refuse `optim: muon` under a launch in which it cannot run.

    Raises:
        ValueError: for an optimizer on the CPU, FSDP1, DeepSpeed's own optimizer or schedule, and clipping under
            DeepSpeed.
    """
    if uses_fsdp() and fsdp_version() == 1:
        raise ValueError("`optim: muon` needs whole matrices, which FSDP1 flattens. Set fsdp_version: 2.")
    if uses_fsdp() and offloads_fsdp():
        raise ValueError("`optim: muon` cannot run with fsdp_offload_params: true, on the CPU. Launch with fsdp2.yaml.")
    if args.deepspeed_plugin is None:
        return
    if launched_sharding(args).offload_optimizer:
        raise ValueError(
            "`optim: muon` cannot run with an optimizer offloaded to the CPU. Launch with zero3.yaml or fsdp2.yaml."
        )
    for section in ("optimizer", "scheduler"):
        if section in args.deepspeed_plugin.deepspeed_config:
            raise ValueError(
                f"`optim: muon` and the DeepSpeed config's `{section}`, which would take its place. Remove the section."
            )
    if args.max_grad_norm:
        # deepspeedai/DeepSpeed#8439, seen in 0.19.8
        raise ValueError(
            f"`max_grad_norm` {args.max_grad_norm} with `optim: muon`: DeepSpeed clips steps instead of gradients, "
            "which divides each by a number that grows with the model. Set max_grad_norm: 0."
        )
