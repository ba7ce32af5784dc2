"""What TRL's and transformers' keys may be and need, and which keys contradict each other.

Tunebook's own keys say it where they are declared (configs.py). All of it is checked before a model or data is loaded.
"""

from collections.abc import Callable
from typing import Any

from annotated_types import Ge, Gt, Interval

from ..environment import fsdp_version, launched_sharding, offloads_fsdp, uses_fsdp
from . import needs
from .needs import Need, Values, equals, has_probability, loss_types, packs_pairs

# What a number may be
POSITIVE, AT_LEAST_ZERO, AT_LEAST_ONE, SHARE = Gt(0), Ge(0), Ge(1), Interval(ge=0, lt=1)
RANGES = {
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "max_length": AT_LEAST_ONE,
    "warmup_steps": AT_LEAST_ZERO,
    "weight_decay": AT_LEAST_ZERO,
    "max_grad_norm": AT_LEAST_ZERO,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "neftune_noise_alpha": POSITIVE,
    "save_total_limit": AT_LEAST_ONE,
    "dataset_num_proc": AT_LEAST_ONE,
    "lora_r": AT_LEAST_ONE,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
    "beta": POSITIVE,
    "label_smoothing": Interval(ge=0, lt=0.5),
    "center_rewards_coefficient": AT_LEAST_ZERO,
}

# (keys, what they need to have an effect)
NEEDS: list[tuple[str, Need]] = [
    (
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type "
        "use_rslora use_dora load_in_4bit load_in_8bit",
        needs.LORA,
    ),
    ("bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage", equals("load_in_4bit", True)),
    ("eval_steps", equals("eval_strategy", "steps")),
    (
        "per_device_eval_batch_size eval_packing eval_delay eval_on_start dataset_test_split",
        needs.EVALUATION,
    ),
    ("do_train", Need(lambda v: v["do_train"], "the value true: a run always trains")),
    ("do_predict", Need(lambda v: not v["do_predict"], "the value false: a run only trains and evaluates")),
    ("ignore_bias_buffers", Need(lambda v: not v["ignore_bias_buffers"], "the value false")),
    ("save_steps", equals("save_strategy", "steps")),
    ("save_total_limit save_only_model", needs.SAVES),
    (
        "metric_for_best_model greater_is_better",
        Need(
            lambda v: (
                v["load_best_model_at_end"]
                or v["save_strategy"] == "best"
                or v["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy")
            ),
            "load_best_model_at_end: true, or save_strategy: best",
        ),
    ),
    ("per_device_train_batch_size", needs.NO_TOKEN_LIMIT),
    (
        "train_sampling_strategy",
        Need(
            lambda v: not packs_pairs(v),
            "packing: false; batches of packed pairs are drawn at random and balanced by tokens",
        ),
    ),
    ("packing_strategy eval_packing", needs.PACKING),
    (
        "optim_args optim_target_modules",
        Need(
            lambda v: v["optim"] != "muon",
            "an optim other than muon, which always takes 5 Newton-Schulz steps with Nesterov momentum",
        ),
    ),
    ("activation_checkpointing_kwargs", equals("activation_checkpointing", True)),
    ("trackio_space_id trackio_bucket_id trackio_static_space_id", needs.reports_to("trackio")),
    ("hub_strategy hub_always_push", equals("push_to_hub", True)),
    (
        "hub_model_id hub_revision hub_private_repo",
        Need(
            lambda v: v["push_to_hub"] or v["push_to_hub_revision"],
            "push_to_hub_revision: true, or push_to_hub: true",
        ),
    ),
    (
        "dataset_config dataset_train_split",
        Need(lambda v: not v["datasets"], "dataset_name; in a mixture, set name and split in each entry of datasets"),
    ),
    (
        "dataset_test_split",
        Need(
            lambda v: v["test_split_size"] is None,
            "no test_split_size: that draws the evaluation rows from the training split",
        ),
    ),
    (
        "label_smoothing",
        Need(
            lambda v: bool(loss_types(v) & {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}),
            "loss_type: sigmoid, robust, exo_pair, aot or aot_unpaired",
        ),
    ),
    ("discopop_tau", Need(lambda v: "discopop" in loss_types(v), "loss_type: discopop")),
    ("f_alpha_divergence_coef", equals("f_divergence_type", "alpha_divergence")),
    ("ref_model_mixup_alpha ref_model_sync_steps", equals("sync_ref_model", True)),
    ("precompute_ref_batch_size", equals("precompute_ref_log_probs", True)),
    ("assistant_only_loss completion_only_loss chat_template_path", needs.NO_PRETRAINING),
    ("chat_template_path", needs.TEMPLATE),
    ("num_train_epochs", Need(lambda v: v["max_steps"] <= 0, "no max_steps: it ends the run whatever the epochs")),
    (
        "gradient_accumulation_steps",
        Need(lambda v: v["global_batch_size"] is None, "no global_batch_size: it sets the accumulation"),
    ),
    (
        "dataloader_prefetch_factor dataloader_persistent_workers",
        Need(lambda v: v["dataloader_num_workers"] > 0, "dataloader_num_workers: 1 or more"),
    ),
]

# Combinations that contradict each other: (what is wrong, the message)
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
        lambda v: v["push_to_hub_revision"] and not (v["hub_model_id"] and v["hub_revision"]),
        "`push_to_hub_revision` needs `hub_model_id` (owner/name) and `hub_revision` (a branch).",
    ),
    (
        lambda v: v["push_to_hub_revision"] and v["push_to_hub"],
        "`push_to_hub` pushes to one revision, `push_to_hub_revision` to one per checkpoint. Set one of them.",
    ),
    (
        lambda v: needs.is_benchmark(v["metric_for_best_model"]) and v.get("benchmark_schedule") in ("after", "beside"),
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
        lambda v: v["train_sampling_strategy"] == "batch_rebalance" and v["task"] != "sft",
        "`train_sampling_strategy: batch_rebalance` knows no pairs. Set packing: true, which balances their batches.",
    ),
    (
        lambda v: v.get("value_head_prefix", "score") != "score" and v["push_to_hub"],
        "`value_head_prefix` with `push_to_hub`, which saves the model under its own names. Take push_to_hub_revision.",
    ),
    (
        lambda v: v["load_best_model_at_end"] and not needs.evaluates(v),
        "`load_best_model_at_end` needs `eval_strategy: steps` or `epoch`.",
    ),
    (
        lambda v: v["task"] == "rm" and v["lora_task_type"] != "SEQ_CLS",
        "`lora_task_type` is SEQ_CLS for reward models, or the head would stay frozen. Remove the key.",
    ),
]


def check_muon(args: Any) -> None:
    """Refuse `optim: muon` under a launch in which it cannot run.

    Raises:
        ValueError: for an optimizer on the CPU, FSDP1, DeepSpeed's own optimizer or schedule, and clipping under
            DeepSpeed.
    """
    if uses_fsdp() and fsdp_version() == 1:
        raise ValueError("`optim: muon` needs whole matrices, which FSDP1 flattens. Set fsdp_version: 2.")
    if uses_fsdp() and offloads_fsdp():
        raise ValueError("`optim: muon` cannot run with fsdp_offload_params: true, on the CPU. Take fsdp2.yaml.")
    if args.deepspeed_plugin is None:
        return
    if launched_sharding(args).offload_optimizer:
        raise ValueError(
            "`optim: muon` cannot run with an optimizer offloaded to the CPU. Take zero3.yaml or fsdp2.yaml."
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
