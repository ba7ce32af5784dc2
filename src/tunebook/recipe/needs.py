"""What a key can need to have an effect: conditions on a recipe's other keys, each with the words that ask for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Every key of a recipe, with its default where it was not given, and `task`
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Need:
    """A condition, and what to set to meet it."""

    holds: Callable[[Values], bool]
    text: str


def equals(name: str, value: Any) -> Need:
    """Return the need of a key with one value."""
    return Need(lambda v: v[name] == value, f"{name}: {str(value).lower()}")


def evaluates(v: Values) -> bool:
    return v["do_eval"] or v["eval_strategy"] != "no"


def reports_to(tracker: str) -> Need:
    def holds(v: Values) -> bool:
        trackers = v["report_to"] if isinstance(v["report_to"], list) else [v["report_to"]]
        return bool({tracker, "all"} & set(trackers))

    return Need(holds, f"report_to: {tracker}")


def loss_types(v: Values) -> set[str]:
    return {v["loss_type"]} if isinstance(v["loss_type"], str) else set(v["loss_type"])


def packs_pairs(v: Values) -> bool:
    return v["task"] != "sft" and v["packing"]


def is_benchmark(metric: str | None) -> bool:
    """Whether a metric_for_best_model is a benchmark's score."""
    return (metric or "").removeprefix("eval_").startswith("bench_")


def has_probability(v: Values) -> bool:
    return any(source.probability is not None for source in v["datasets"] or [])


EVALUATION = Need(evaluates, "eval_strategy: steps or epoch, or do_eval: true")
PACKING = equals("packing", True)
LORA = equals("use_peft", True)
MUON = equals("optim", "muon")
PUSHES = equals("push_to_hub_revision", True)
SAVES = Need(lambda v: v["save_strategy"] != "no", "save_strategy other than no")
NO_TOKEN_LIMIT = Need(
    lambda v: not v.get("max_tokens_per_batch"), "no max_tokens_per_batch: it decides how many pairs a batch has"
)
NO_PRETRAINING = Need(lambda v: not v.get("pretraining"), "pretraining: false; it trains on plain text")
NO_MESSAGES = Need(lambda v: v["messages_column"] is None, "no messages_column: a row has one or the other")
NO_COMPLETION = Need(lambda v: v["completion_column"] is None, "no completion_column: a row has one or the other")
TEMPLATE = Need(lambda v: v["apply_chat_template"] is not False, "apply_chat_template other than false")
BENCHMARKS = Need(lambda v: bool(v["benchmarks"]), "benchmarks")
PROMPTS = Need(lambda v: bool(v["eval_prompts"]), "eval_prompts")
KEPT_REFERENCE = Need(
    lambda v: not v["precompute_ref_log_probs"] and (not v["use_peft"] or v["ref_model_name_or_path"] is not None),
    "a reference model that is kept during training: no precompute_ref_log_probs, and no LoRA without "
    "ref_model_name_or_path",
)
