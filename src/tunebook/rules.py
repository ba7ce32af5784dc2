"""What a recipe's values may be, and which keys have an effect together: checked before a model or data is loaded."""

from collections.abc import Callable, Mapping
from typing import Any

from annotated_types import Ge, Gt, Interval

# What a number may be; checked when the recipe is parsed.
POSITIVE, AT_LEAST_ZERO, AT_LEAST_ONE, SHARE = Gt(0), Ge(0), Ge(1), Interval(ge=0, lt=1)
RANGES = {
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "global_batch_size": AT_LEAST_ONE,
    "context_parallel_size": AT_LEAST_ONE,
    "context_parallel_head_stride": AT_LEAST_ONE,
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
    "max_tokens_per_batch": AT_LEAST_ONE,
    "center_rewards_coefficient": AT_LEAST_ZERO,
    "muon_learning_rate": POSITIVE,
    "muon_momentum": SHARE,
    "muon_weight_decay": AT_LEAST_ZERO,
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


def packs_pairs(v: Values) -> bool:
    return v["packing"] and "share_prefix" in v


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
    ("do_train", lambda v: v["do_train"], "the value true: a run always trains"),
    ("do_predict", lambda v: not v["do_predict"], "the value false: a run trains and evaluates"),
    ("ignore_bias_buffers", lambda v: not v["ignore_bias_buffers"], "the value false"),
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
    ("share_prefix max_tokens_per_batch", lambda v: v["packing"], "packing: true"),
    (
        "per_device_train_batch_size global_batch_size",
        lambda v: not v.get("max_tokens_per_batch"),
        "no max_tokens_per_batch: it decides how many pairs a batch has",
    ),
    (
        "train_sampling_strategy",
        lambda v: not packs_pairs(v),
        "packing: false; batches of packed pairs are drawn at random and balanced by tokens",
    ),
    ("packing_strategy eval_packing", lambda v: v["packing"], "packing: true"),
    (
        "context_parallel_head_stride",
        lambda v: v["context_parallel_size"] > 1,
        "context_parallel_size of 2 or more",
    ),
    ("muon_learning_rate muon_momentum muon_weight_decay", lambda v: v["optim"] == "muon", "optim: muon"),
    (
        "optim_args optim_target_modules",
        lambda v: v["optim"] != "muon",
        "an optim other than muon, which does 5 Newton-Schulz steps with Nesterov momentum, always",
    ),
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
        lambda v: bool(v["benchmarks"]) and "value_head_prefix" not in v,
        "benchmarks, of sft or dpo: those of a reward model run inside the evaluation",
    ),
    (
        "benchmarks",
        lambda v: "value_head_prefix" not in v or evaluates(v),
        "eval_strategy: steps or epoch, or do_eval: true",
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
    (
        lambda v: v["optim"] == "muon" and v["use_peft"] and not v["lora_modules_to_save"],
        "`optim: muon` trains whole weights, `use_peft` none: LoRA's matrices go to AdamW. Leave one out.",
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
        "`label_smoothing` with sigmoid (cDPO) and another loss that reads it: TRL has one value for all. Take one.",
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
        lambda v: v["context_parallel_size"] > 1 and not v["packing"],
        "`context_parallel_size` shares packed rows between processes. Set packing: true.",
    ),
    (
        lambda v: (v["context_parallel_size"] > 1 or packs_pairs(v)) and v["neftune_noise_alpha"] is not None,
        "`context_parallel_size`, or `packing` of pairs, with `neftune_noise_alpha` is not defined: the noise depends "
        "on the length of the row. Leave one out.",
    ),
    (
        lambda v: v.get("sync_ref_model") and v["ref_offload"],
        "`sync_ref_model` mixes the policy into a reference that `ref_offload` keeps on the CPU. Leave one out.",
    ),
    (
        lambda v: (v.get("dataset_kwargs") or {}).get("skip_prepare_dataset"),
        "`dataset_kwargs.skip_prepare_dataset` has no effect: rows are tokenized before the trainer is built.",
    ),
    (
        lambda v: v["enable_jit_checkpoint"],
        "`enable_jit_checkpoint` saves at another step on each rank, and lets a run that was ended look finished "
        "(transformers 5.23). Set `save_steps`; the same command goes on from the last checkpoint.",
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
        lambda v: v["train_sampling_strategy"] == "batch_rebalance" and "share_prefix" in v,
        "`train_sampling_strategy: batch_rebalance` knows no pairs. Set packing: true, which balances their batches.",
    ),
    (
        lambda v: v.get("value_head_prefix", "score") != "score" and v["push_to_hub"],
        "`value_head_prefix` with `push_to_hub`, which saves the model under its own names. Take push_to_hub_revision.",
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
