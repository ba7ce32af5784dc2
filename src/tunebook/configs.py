"""Every key that tunebook adds to TRL's configs, and the checks that need neither a model nor data.

A recipe fills three dataclasses: [`ScriptArguments`] (which data), [`ModelConfig`] (which model, LoRA, quantization) and
the task's own: [`SFTConfig`], [`RewardConfig`] or [`DPOConfig`]. What the tasks share is in [`RunConfig`], a mixin that
comes before TRL's class. Keys that transformers or TRL already have are not repeated here, only their defaults.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import trl
from annotated_types import Ge, Gt, Interval
from trl.scripts.utils import DatasetConfig as TRLDatasetConfig
from trl.scripts.utils import ScriptArguments as TRLScriptArguments


def key(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DatasetConfig(TRLDatasetConfig):
    """One source of a mixture: TRL's `path, name, data_dir, data_files, split, fraction`, and the three below."""

    __pydantic_config__ = {"extra": "forbid"}

    columns: list[str] | dict[str, str] | None = key(
        None, "Columns to keep (list), or this source's columns renamed to the recipe's ({old: new})."
    )
    probability: float | None = key(None, "Chance that the next row of the mixture comes from this source.")
    max_samples: int | None = key(None, "Use only the first N rows of this source.")


@dataclass
class ScriptArguments(TRLScriptArguments):
    """Which data, and how a row becomes text."""

    datasets: list[DatasetConfig] | None = key(None, "A mixture of data sets, instead of dataset_name.")
    mixture_stopping: Literal["first_exhausted", "all_exhausted"] = key(
        "first_exhausted", "When a mixture by probability ends: with its first exhausted source, or with its last."
    )
    eval_dataset_name: str | None = key(None, "Evaluate on this data set: Hub id, local file or folder.")
    test_split_size: float | None = key(
        None, "Hold out this fraction (below 1) or number of rows for evaluation, drawn with the seed."
    )
    max_train_samples: int | None = key(None, "Train on the first N rows only.")
    max_eval_samples: int | None = key(None, "Evaluate on the first N rows only.")
    prompt_column: str | None = key(None, "Column of the prompt: text or messages. Default: prompt.")
    prompt_template: str | None = key(None, "Put a plain prompt into this text at {}, e.g. 'User: {}\\nAssistant: '.")
    system_prompt: str | None = key(None, "System turn for conversations that have none.")
    chat_template: str | None = key(None, "Jinja chat template, written into the recipe.")
    apply_chat_template: bool | None = key(
        None, "Make turns of plain prompts and answers (true). Default: only messages go through the template."
    )


@dataclass
class ModelConfig(trl.ModelConfig):
    """Which model, LoRA and quantization."""

    num_layers_unfrozen: int | None = key(
        None, "Train the top N layers, the final norm and the head only. Default: every layer."
    )

    def __post_init__(self):
        modules = self.lora_target_modules
        super().__post_init__()
        # TRL 1.16 makes text of a list of one, for all-linear; PEFT takes text for a pattern of the module's whole path
        if modules is not None and modules != ["all-linear"]:
            self.lora_target_modules = modules


@dataclass
class RewardModelConfig(ModelConfig):
    # With TRL's default, CAUSAL_LM, PEFT leaves the reward head frozen at its random start, without a word
    lora_task_type: str = key("SEQ_CLS", "Always SEQ_CLS for reward models, which trains and saves the head too.")


@dataclass
class RunConfig:
    """What the three tasks share: batch, checkpoints, trackers."""

    # TRL turns checkpointing on under the old name, which transformers 5.23 announces as deprecated in every run
    gradient_checkpointing: bool | None = key(None, "Renamed to activation_checkpointing.")
    activation_checkpointing: bool | None = key(True, "Recompute activations in the backward pass, to save memory.")

    global_batch_size: int | None = key(
        None, "Rows a step over all devices; sets gradient_accumulation_steps from it."
    )
    resume_from_checkpoint: str = key(
        "auto",
        "auto: go on from the last complete checkpoint in output_dir. never: start anew. Or a checkpoint's path.",
    )
    force_resume: bool = key(False, "Resume although the model, the data or the seed changed.")
    save_total_gb: float | None = key(
        None, "Delete the oldest checkpoints when all together are larger than this (GB)."
    )
    wandb_entity: str | None = key(None, "Weights & Biases user or team.")
    wandb_project: str | None = key(None, "Weights & Biases project.")
    wandb_run_group: str | None = key(None, "Weights & Biases group of runs.")
    callbacks: list[Literal["push_to_hub_revision"]] = field(
        default_factory=list, metadata={"help": "push_to_hub_revision: the same as push_to_hub_revision: true."}
    )
    push_to_hub_revision: bool = key(
        False,
        "Push each checkpoint to <hub_revision>-step-<9 digits> of hub_model_id, the final model to hub_revision.",
    )
    overwrite_hub_revision: bool = key(False, "Push although the revision already holds a model.")
    hub_push_failure: Literal["warn", "raise"] = key("warn", "What a push that fails does to the run.")
    hub_push_to_main: bool = key(False, "Push the final model to main too.")
    benchmarks: list[str] = field(
        default_factory=list,
        metadata={"help": "Run on each checkpoint: names in configs/benchmarks, paths; for rm, files of pairs."},
    )
    benchmark_launcher: Literal["local", "slurm"] = key("local", "Where benchmarks run: subprocesses, or Slurm jobs.")
    benchmark_schedule: Literal["after", "beside", "evaluation"] | None = key(
        None,
        "When: after training, beside it, or at each evaluation, which waits. Default: evaluation if the best model is "
        "chosen by a benchmark, beside with slurm or benchmark_devices, else after.",
    )
    benchmark_devices: list[str] = field(
        default_factory=list, metadata={"help": "CUDA_VISIBLE_DEVICES of each benchmark that runs at a time."}
    )
    benchmark_timeout: float = key(7200, "Seconds after which a benchmark is given up.")

    @property
    def pushes_revisions(self) -> bool:
        return self.push_to_hub_revision or "push_to_hub_revision" in self.callbacks

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu and not has_fast_bf16():
            self.bf16 = bool(self.bf16)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.accelerator.is_available():
            # accelerate 1.15 (state.py) lists GPU types only and silently gives DDP elsewhere
            raise ValueError(
                "FSDP needs a GPU; on a CPU accelerate would run DDP instead. Take ddp.yaml or zero3.yaml."
            )
        super().__post_init__()
        self.gradient_accumulation_steps = accumulation_steps(
            self.global_batch_size, self.per_device_train_batch_size, self.world_size, self.gradient_accumulation_steps
        )


@dataclass
class GenerationConfig:
    """Generations while it trains: SFT and DPO."""

    eval_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "Generate from these at each evaluation: prompts, a .txt or .jsonl file, or column:NAME."},
    )
    eval_generation_kwargs: dict[str, Any] | None = key(
        None, "Of generate(), e.g. {max_new_tokens: 64}; one key may have a list of values to sweep."
    )
    eval_metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "module:function with (samples, prompts, outputs) -> {name: [values]}."},
    )
    stop_sequences: list[str] = field(default_factory=list, metadata={"help": "Cut generations at these texts."})


@dataclass
class SFTConfig(GenerationConfig, RunConfig, trl.SFTConfig):
    messages_column: str | None = key(None, "Column of whole conversations. Default: messages, or conversations.")
    completion_column: str | None = key(None, "Column of the completion: text or messages. Default: completion.")
    text_column: str | None = key(None, "Column of plain text, trained on throughout. Default: text.")
    last_turn_only_loss: bool = key(False, "Train on the last assistant turn of a conversation only.")
    pretraining: bool = key(False, "Continue pre-training on text_column: no template, no EOS, loss on every token.")


@dataclass
class PreferenceConfig(RunConfig):
    """What reward models and DPO share."""

    chosen_column: str | None = key(None, "Column of the preferred answer: text or messages. Default: chosen.")
    rejected_column: str | None = key(None, "Column of the other answer: text or messages. Default: rejected.")
    packing: bool = key(False, "Drop the padding: run a batch as one packed row. Same numbers, faster.")
    share_prefix: bool = key(False, "With packing: run the prompt that chosen and rejected share only once.")


@dataclass
class RewardConfig(PreferenceConfig, trl.RewardConfig):
    loss_type: Literal["sigmoid", "logexp"] = key(
        "sigmoid", "-logsigmoid(chosen - rejected), or log(1 + exp(rejected - chosen)): the same in exact arithmetic."
    )
    use_margin: bool = key(False, "Subtract margin_column from the reward difference.")
    margin_column: str | None = key(None, "Column of margins. Default: margin.")
    fp32_loss: bool = key(True, "Compute the loss in float32, whatever the model's dtype.")
    value_head_prefix: str = key("score", "Name of the reward head's module.")
    router_aux_loss_coef: float | None = key(None, "Weight of the load-balancing loss of a mixture-of-experts model.")
    calibrate_rewards: bool = key(False, "Store mean and std of the evaluation rewards in config.json.")
    subset_column: str | None = key(None, "Also report evaluation accuracy by the values of this column.")


@dataclass
class DPOConfig(GenerationConfig, PreferenceConfig, trl.DPOConfig):
    # Where these two are given by TRL's SFTConfig and RewardConfig, DPOConfig lacks them (trl 1.16)
    chat_template_path: str | None = key(None, "Path of a .jinja file, or a tokenizer whose chat template to take.")
    eos_token: str | None = key(None, "Token that ends a turn or sequence. Default: the tokenizer's.")

    ipo_reduction: Literal["mean", "sum"] = key(
        "mean", "IPO on log-probabilities averaged over the completion's tokens (TRL), or summed (OpenRLHF)."
    )
    nll_loss_coef: float | None = key(
        None, "Add this times the negative log-likelihood of the chosen answer: mean over tokens, then over sequences."
    )
    ref_model_name_or_path: str | None = key(None, "Reference model. Default: the model as it was before training.")
    ref_model_revision: str = key("main", "Revision of ref_model_name_or_path.")
    ref_offload: bool = key(False, "Keep the reference model on the CPU between its passes.")


def has_fast_bf16() -> bool:
    """Whether this CPU has bf16 instructions. Without them a bf16 matmul runs ~80x slower than one in float32 (1.6
    against 136 GFLOP/s on two cores), with them ~4x faster (1,320 against 330)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def accumulation_steps(global_batch: int | None, per_device: int, world_size: int, given: int) -> int:
    """Micro-batches a step, so that `per_device * world_size * steps == global_batch`.

    Raises:
        ValueError: when the global batch is not a multiple of what all devices take at once.
    """
    if global_batch is None:
        return given
    steps, rest = divmod(global_batch, per_device * world_size)
    if rest or not steps:
        raise ValueError(
            f"`global_batch_size` {global_batch} is not a multiple of per_device_train_batch_size {per_device} x "
            f"{world_size} processes = {per_device * world_size}. Change one of them."
        )
    return steps


# What a number may be; checked when the recipe is parsed.
POSITIVE, AT_LEAST_ZERO, AT_LEAST_ONE, SHARE = Gt(0), Ge(0), Ge(1), Interval(ge=0, lt=1)
RANGES = {
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "global_batch_size": AT_LEAST_ONE,
    "max_length": AT_LEAST_ONE,
    "warmup_steps": AT_LEAST_ZERO,
    "weight_decay": AT_LEAST_ZERO,
    "max_grad_norm": AT_LEAST_ZERO,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "neftune_noise_alpha": POSITIVE,
    "save_total_limit": AT_LEAST_ONE,
    "save_total_gb": POSITIVE,
    "dataset_num_proc": AT_LEAST_ONE,
    "max_train_samples": AT_LEAST_ONE,
    "max_eval_samples": AT_LEAST_ONE,
    "test_split_size": POSITIVE,
    "num_layers_unfrozen": AT_LEAST_ZERO,
    "router_aux_loss_coef": AT_LEAST_ZERO,
    "lora_r": AT_LEAST_ONE,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
    "beta": POSITIVE,
    "label_smoothing": Interval(ge=0, lt=0.5),
    "nll_loss_coef": AT_LEAST_ZERO,
    "benchmark_timeout": POSITIVE,
    "center_rewards_coefficient": AT_LEAST_ZERO,
}

Values = Mapping[str, Any]  # every key of the recipe's three dataclasses, with its default where it was not given


def evaluates(v: Values) -> bool:
    return v["do_eval"] or v["eval_strategy"] != "no"


def reports_to(v: Values, tracker: str) -> bool:
    report_to = v["report_to"]
    return tracker in report_to or "all" in report_to if isinstance(report_to, list) else report_to in (tracker, "all")


def loss_types(v: Values) -> set[str]:
    return {v["loss_type"]} if isinstance(v["loss_type"], str) else set(v["loss_type"])


def pushes(v: Values) -> bool:
    return v["push_to_hub_revision"] or "push_to_hub_revision" in v["callbacks"]


def best_by_benchmark(v: Values) -> bool:
    return (v["metric_for_best_model"] or "").removeprefix("eval_").startswith("bench_")


def has_probability(v: Values) -> bool:
    return any(source.probability is not None for source in v["datasets"] or [])


# A key is honoured or refused: (keys, what must hold for them to have an effect, how to say it).
NEEDS: list[tuple[str, Callable[[Values], bool], str]] = [
    (
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type "
        "use_rslora use_dora load_in_4bit load_in_8bit",
        lambda v: v["use_peft"],
        "use_peft: true",
    ),
    (
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
        lambda v: v["load_in_4bit"],
        "load_in_4bit: true",
    ),
    ("value_head_prefix", lambda v: not v["use_peft"], "use_peft: false; an adapter's head is called score"),
    ("num_layers_unfrozen", lambda v: not v["use_peft"], "use_peft: false; LoRA already freezes the model"),
    ("eval_steps", lambda v: v["eval_strategy"] == "steps", "eval_strategy: steps"),
    (
        "eval_dataset_name test_split_size max_eval_samples per_device_eval_batch_size eval_packing eval_delay "
        "eval_on_start subset_column calibrate_rewards dataset_test_split",
        evaluates,
        "eval_strategy: steps or epoch, or do_eval: true",
    ),
    ("save_steps", lambda v: v["save_strategy"] == "steps", "save_strategy: steps"),
    (
        "save_total_limit save_total_gb save_only_model",
        lambda v: v["save_strategy"] != "no",
        "save_strategy other than no",
    ),
    (
        "metric_for_best_model greater_is_better",
        lambda v: (
            v["load_best_model_at_end"]
            or v["save_strategy"] == "best"
            or v["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy")
        ),
        "load_best_model_at_end: true, or save_strategy: best",
    ),
    ("share_prefix", lambda v: v["packing"], "packing: true"),
    ("packing_strategy eval_packing", lambda v: v["packing"], "packing: true"),
    ("activation_checkpointing_kwargs", lambda v: v["activation_checkpointing"], "activation_checkpointing: true"),
    (
        "wandb_entity wandb_project wandb_run_group",
        lambda v: reports_to(v, "wandb"),
        "report_to: wandb",
    ),
    (
        "trackio_space_id trackio_bucket_id trackio_static_space_id",
        lambda v: reports_to(v, "trackio"),
        "report_to: trackio",
    ),
    (
        "hub_strategy hub_always_push",
        lambda v: v["push_to_hub"],
        "push_to_hub: true",
    ),
    (
        "hub_model_id hub_revision hub_private_repo",
        lambda v: v["push_to_hub"] or pushes(v),
        "push_to_hub_revision: true, or push_to_hub: true",
    ),
    ("overwrite_hub_revision hub_push_failure hub_push_to_main", pushes, "push_to_hub_revision: true"),
    (
        "benchmark_launcher benchmark_schedule benchmark_devices benchmark_timeout",
        lambda v: bool(v["benchmarks"]),
        "benchmarks",
    ),
    ("benchmark_devices", lambda v: v["benchmark_launcher"] == "local", "benchmark_launcher: local"),
    ("eval_prompts", evaluates, "eval_strategy: steps or epoch, or do_eval: true"),
    ("eval_generation_kwargs eval_metrics stop_sequences", lambda v: bool(v["eval_prompts"]), "eval_prompts"),
    ("mixture_stopping", has_probability, "a probability for every entry of datasets"),
    (
        "dataset_config dataset_train_split",
        lambda v: not v["datasets"],
        "dataset_name; in a mixture, set name and split in each entry of datasets",
    ),
    (
        "dataset_test_split",
        lambda v: v["test_split_size"] is None,
        "no test_split_size: that draws the evaluation rows from the training split",
    ),
    (
        "test_split_size",
        lambda v: v["eval_dataset_name"] is None,
        "no eval_dataset_name: the two are different evaluation sets",
    ),
    ("ref_model_revision", lambda v: v["ref_model_name_or_path"] is not None, "ref_model_name_or_path"),
    ("margin_column", lambda v: v["use_margin"], "use_margin: true"),
    (
        "label_smoothing",
        lambda v: bool(loss_types(v) & {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}),
        "loss_type: sigmoid, robust, exo_pair, aot or aot_unpaired",
    ),
    ("ipo_reduction", lambda v: "ipo" in loss_types(v), "loss_type: ipo"),
    ("discopop_tau", lambda v: "discopop" in loss_types(v), "loss_type: discopop"),
    (
        "f_alpha_divergence_coef",
        lambda v: v["f_divergence_type"] == "alpha_divergence",
        "f_divergence_type: alpha_divergence",
    ),
    ("ref_model_mixup_alpha ref_model_sync_steps", lambda v: v["sync_ref_model"], "sync_ref_model: true"),
    ("precompute_ref_batch_size", lambda v: v["precompute_ref_log_probs"], "precompute_ref_log_probs: true"),
    (
        "ref_offload",
        lambda v: not v["precompute_ref_log_probs"] and (not v["use_peft"] or v["ref_model_name_or_path"] is not None),
        "a reference model that is kept during training: no precompute_ref_log_probs, and no LoRA without "
        "ref_model_name_or_path",
    ),
    (
        "assistant_only_loss last_turn_only_loss completion_only_loss completion_column messages_column prompt_column "
        "prompt_template system_prompt chat_template chat_template_path apply_chat_template",
        lambda v: not v.get("pretraining"),
        "pretraining: false; it trains on plain text",
    ),
    ("completion_column", lambda v: v["messages_column"] is None, "no messages_column: a row has one or the other"),
    ("text_column", lambda v: v["messages_column"] is None, "no messages_column: a row has one or the other"),
    ("text_column", lambda v: v["completion_column"] is None, "no completion_column: a row has one or the other"),
    (
        "chat_template",
        lambda v: v["chat_template_path"] is None,
        "no chat_template_path: give the template in one place",
    ),
    (
        "chat_template chat_template_path system_prompt",
        lambda v: v["apply_chat_template"] is not False,
        "apply_chat_template other than false",
    ),
    ("num_train_epochs", lambda v: v["max_steps"] <= 0, "no max_steps: it ends the run whatever the epochs"),
    (
        "gradient_accumulation_steps",
        lambda v: v["global_batch_size"] is None,
        "no global_batch_size: it sets the accumulation",
    ),
    (
        "dataloader_prefetch_factor dataloader_persistent_workers",
        lambda v: v["dataloader_num_workers"] > 0,
        "dataloader_num_workers: 1 or more",
    ),
]

# Combinations that contradict each other: (what is wrong, the message).
CONTRADICTIONS: list[tuple[Callable[[Values], bool], str]] = [
    (lambda v: not v["model_name_or_path"], "`model_name_or_path` is missing: a Hub id or a folder."),
    (lambda v: not v["output_dir"], "`output_dir` is missing: where checkpoints, the model and the reports go."),
    (
        lambda v: not v["dataset_name"] and not v["datasets"],
        "`dataset_name` is missing: a Hub id, a local file or folder; or `datasets`, a mixture.",
    ),
    (
        lambda v: v["dataset_name"] and v["datasets"],
        "`dataset_name` and `datasets` are both set: name one data set, or list a mixture.",
    ),
    (
        lambda v: v["dataset_streaming"],
        "`dataset_streaming` is not supported: rows are tokenized once and cached on disk, which resume relies on.",
    ),
    (
        lambda v: v["datasets"] and len({s.probability is None for s in v["datasets"]}) > 1,
        "`datasets`: set `probability` for every entry or for none.",
    ),
    (
        lambda v: v["datasets"] and len({s.fraction is None for s in v["datasets"]}) > 1,
        "`datasets`: set `fraction` for every entry or for none.",
    ),
    (
        lambda v: has_probability(v) and any(s.fraction is not None for s in v["datasets"]),
        "`datasets`: `probability` and `fraction` are two ways to mix. Take one.",
    ),
    (
        lambda v: has_probability(v) and not 0.999 < sum(s.probability or 0 for s in v["datasets"]) < 1.001,
        "`datasets`: the probabilities do not add up to 1.",
    ),
    (
        lambda v: any(
            share is not None and share <= 0 for s in v["datasets"] or [] for share in (s.fraction, s.probability)
        ),
        "`datasets`: `fraction` and `probability` must be above 0. Leave out an entry that is not wanted.",
    ),
    (
        lambda v: v["prompt_template"] is not None and "{}" not in v["prompt_template"],
        "`prompt_template` has no {}: the place of the prompt.",
    ),
    (
        lambda v: v["test_split_size"] is not None and v["test_split_size"] >= 1 and v["test_split_size"] % 1,
        "`test_split_size` is a fraction below 1 or a whole number of rows.",
    ),
    (
        lambda v: pushes(v) and not (v["hub_model_id"] and v["hub_revision"]),
        "`push_to_hub_revision` needs `hub_model_id` (owner/name) and `hub_revision` (a branch).",
    ),
    (
        lambda v: pushes(v) and v["push_to_hub"],
        "`push_to_hub` pushes to one revision, `push_to_hub_revision` to one a checkpoint. Take one.",
    ),
    (
        lambda v: best_by_benchmark(v) and v["benchmark_schedule"] in ("after", "beside"),
        "`metric_for_best_model` is a benchmark's: it needs `benchmark_schedule: evaluation`.",
    ),
    (lambda v: v["bf16"] and v["fp16"], "`bf16` and `fp16` are both true. Take one."),
    (
        lambda v: v.get("assistant_only_loss") and v["last_turn_only_loss"],
        "`assistant_only_loss` trains on all assistant turns, `last_turn_only_loss` on the last. Take one.",
    ),
    (
        lambda v: (
            bool(v.get("label_smoothing"))
            and "sigmoid" in loss_types(v)
            and bool(loss_types(v) & {"robust", "exo_pair", "aot", "aot_unpaired"})
        ),
        "`label_smoothing` with sigmoid (cDPO) and another loss that reads it: TRL has one value for all. Leave one out.",
    ),
    (
        lambda v: (
            v.get("ipo_reduction") == "sum"
            and (v["f_divergence_type"] != "reverse_kl" or v["ld_alpha"] is not None or v["use_weighting"])
        ),
        "`ipo_reduction: sum` with f_divergence_type, ld_alpha or use_weighting is not defined. Leave one out.",
    ),
    (
        lambda v: v.get("truncation_mode") == "keep_end",
        "`truncation_mode: keep_end` cuts the prompt's start away and is deprecated in TRL. Remove it.",
    ),
    (
        lambda v: v.get("padding_free"),
        "`padding_free` is switched off by TRL for DPO and needs uncut rows in SFT. Set packing: true instead.",
    ),
    (
        lambda v: v.get("packing") and v["max_length"] is None,
        "`packing` needs `max_length`: the length of a packed row.",
    ),
    (
        lambda v: (v.get("dataset_kwargs") or {}).get("skip_prepare_dataset"),
        "`dataset_kwargs.skip_prepare_dataset` has no effect: rows are tokenized before the trainer is built.",
    ),
    (
        lambda v: v["hub_token"] is not None,
        "`hub_token` would be written to files. Log in with `hf auth login`, or set HF_TOKEN.",
    ),
    (
        lambda v: v["train_sampling_strategy"] == "group_by_length",
        "`train_sampling_strategy: group_by_length` has no effect on tokenized rows. Set packing: true instead.",
    ),
    (
        lambda v: v["load_best_model_at_end"] and not evaluates(v),
        "`load_best_model_at_end` needs `eval_strategy: steps` or `epoch`.",
    ),
    (
        lambda v: "value_head_prefix" in v and v["lora_task_type"] != "SEQ_CLS",
        "`lora_task_type` is SEQ_CLS for reward models, or the head would stay frozen. Remove the key.",
    ),
]
