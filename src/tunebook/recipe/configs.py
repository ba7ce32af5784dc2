"""Every key that tunebook adds to TRL's configs, each with its range, its choices and what it needs to have an effect.

A recipe fills three dataclasses: [`ScriptArguments`] (which data), [`ModelConfig`] (which model, LoRA, quantization)
and the task's own: [`SFTConfig`], [`RewardConfig`] or [`DPOConfig`]. What the tasks share is in [`RunConfig`], a mixin
that comes before TRL's class. Keys that transformers or TRL already have are not repeated, only their defaults.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import trl
from accelerate.utils.fsdp_utils import disable_fsdp_ram_efficient_loading
from annotated_types import Interval
from transformers import get_scheduler
from trl.scripts.utils import DatasetConfig as TRLDatasetConfig
from trl.scripts.utils import ScriptArguments as TRLScriptArguments

from ..environment import uses_fsdp, uses_parallelism_config
from .rules import check_fsdp, check_fsdp_device, check_muon

if TYPE_CHECKING:
    from transformers import TrainingArguments
else:
    TrainingArguments = object  # a dataclass would bring its defaults into every mixin, in place of TRL's

T = TypeVar("T")

EVALUATION = "eval_strategy: steps or epoch, or do_eval: true"
EVALUATES = "eval_strategy: steps or epoch"
PACKING = "packing: true"
CONTEXT = "context_parallel_size of 2 or more"
SCORE_HEAD = "use_peft: false; an adapter's head is called score"
ALL_LAYERS = "no num_layers_unfrozen; it freezes the embeddings"
NO_LORA = "use_peft: false; LoRA already freezes the model"
LORA = "use_peft: true"
MUON = "optim: muon"
PUSHES = "push_to_hub_revision: true"
WANDB = "report_to: wandb or all"
TURNS = "pretraining: false; it trains on plain text"
TEMPLATE = "apply_chat_template other than false"
SAVES = "save_strategy other than no"
NO_EVAL_SET = "no eval_dataset_name; the two are different evaluation sets"
ONE_TEMPLATE = "no chat_template_path; give the template in one place"
NO_MESSAGES = "no messages_column; a row has one or the other"
NO_COMPLETION = "no completion_column; a row has one or the other"
NO_TOKEN_LIMIT = "no max_tokens_per_batch; it decides how many pairs a batch has"
NO_PRECOMPUTED = "precompute_ref_log_probs: false; that keeps no reference"
OTHER_REFERENCE = "use_peft: false, or ref_model_name_or_path; with LoRA the model is its own reference"


def key(default: T, help: str, *needs: str, **limits: float) -> T:
    """Declare a key.

    Args:
        needs: conditions that must hold for the key to have an effect, as needs.py reads them.
        limits: ge, gt, le, lt of its number.
    """
    metadata = {"help": help, "needs": needs, "range": Interval(**limits) if limits else None}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class DatasetConfig(TRLDatasetConfig):
    """One source of a mixture: TRL's `path, name, data_dir, data_files, split, fraction`, and the three below."""

    __pydantic_config__ = {"extra": "forbid"}

    columns: list[str] | dict[str, str] | None = key(  # type: ignore[assignment] # TRL's is a list
        None, "Columns to keep (list), or this source's columns renamed to the recipe's ({old: new})."
    )
    probability: float | None = key(None, "Chance that the next row of the mixture comes from this source.")
    max_samples: int | None = key(None, "Use only the first N rows of this source.")


@dataclass
class ScriptArguments(TRLScriptArguments):
    """The data, and how a row becomes text."""

    datasets: list[DatasetConfig] | None = key(None, "A mixture of data sets, instead of dataset_name.")
    mixture_stopping: Literal["first_exhausted", "all_exhausted"] = key(
        "first_exhausted", "When a mixture by probability ends: with its first or its last exhausted source."
    )
    eval_dataset_name: str | None = key(None, "Evaluate on this data set: Hub id, local file or folder.", EVALUATION)
    test_split_size: float | None = key(
        None, "Hold out a fraction (below 1) or number of rows, drawn with the seed.", EVALUATION, NO_EVAL_SET, gt=0
    )
    max_train_samples: int | None = key(None, "Train on the first N rows only.", ge=1)
    max_eval_samples: int | None = key(None, "Evaluate on the first N rows only.", EVALUATION, ge=1)
    prompt_column: str | None = key(
        None, "Column of the prompt: text or messages. Default: prompt. none: pairs that have no prompt.", TURNS
    )
    prompt_template: str | None = key(
        None,
        "Put a plain prompt into this text at {}, or columns at {name}; [[...]] is left out where they are empty.",
        TURNS,
    )
    system_column: str | None = key(
        None, "Column of system prompts. Default: system, in Alpaca's and ShareGPT's layouts.", TURNS
    )
    history_column: str | None = key(
        None, "Column of earlier [question, answer] pairs. Default: history, in Alpaca's layout.", TURNS
    )
    message_mapping: dict[str, Any] | None = key(
        None, "Names in messages: {role: ..., content: ..., roles: {theirs: ours}}.", TURNS
    )
    system_prompt: str | None = key(None, "System turn for conversations that have none.", TURNS, TEMPLATE)
    chat_template: str | None = key(None, "Jinja chat template itself.", TURNS, TEMPLATE, ONE_TEMPLATE)
    apply_chat_template: bool | None = key(
        None, "Make turns of plain prompts and answers (true). Default: of messages only.", TURNS
    )


@dataclass
class ModelConfig(trl.ModelConfig):
    """The model, LoRA and quantization."""

    if TYPE_CHECKING:
        model_name_or_path: str = ""  # the rules ask for it

    num_layers_unfrozen: int | None = key(
        None, "Train the top N layers, the final norm and the head only. Default: all.", NO_LORA, ge=0
    )
    adapter_name_or_path: str | None = key(
        None, "Train this LoRA adapter of model_name_or_path further, not a new one: Hub id or folder.", LORA
    )
    adapter_revision: str = key("main", "Revision of adapter_name_or_path.", "adapter_name_or_path")
    new_tokens: list[str] = key(
        [], "Texts that become a token each. Their embeddings are trained, with LoRA too.", ALL_LAYERS
    )

    def __post_init__(self) -> None:
        modules = self.lora_target_modules
        super().__post_init__()
        # PATCH(trl<1.17): TRL makes text of a list of one, for all-linear, and PEFT takes text for a pattern of the
        # module's whole path. Waits for trl/trainer/model_config.py:177. Delete when only all-linear becomes text.
        if modules is not None and modules != ["all-linear"]:
            self.lora_target_modules = modules


@dataclass
class RewardModelConfig(ModelConfig):
    # With TRL's default, CAUSAL_LM, PEFT silently leaves the reward head frozen at its random start
    lora_task_type: str = key("SEQ_CLS", "Always SEQ_CLS for reward models, which trains and saves the head too.", LORA)


@dataclass
class RunConfig(TrainingArguments):
    """The keys of all three tasks: batch, checkpoints, trackers, pushes to the Hub."""

    if TYPE_CHECKING:
        output_dir: str = ""  # transformers fills it in
        report_to: list[str] = dataclasses.field(default_factory=list)
        hub_model_id: str = ""  # the rules ask for it and the next where a revision is pushed
        hub_revision: str = ""
        max_length: int | None = None  # in TRL's config of each task

    # PATCH(trl<1.17): TRL turns checkpointing on under its old name, which transformers announces as deprecated in
    # every run. Waits for trl/trainer/base_config.py. Delete when TRL sets `activation_checkpointing`.
    gradient_checkpointing: bool = key(None, "Renamed to activation_checkpointing.")  # type: ignore[assignment]
    activation_checkpointing: bool | None = key(
        True, "Recompute activations in the backward pass; only cheap ones with {selective: true} in its kwargs."
    )

    # transformers' default, false, has no effect either
    do_train: bool = key(True, "A run always trains.", "do_train: true; a run always trains")
    optim: str = key("adamw_torch_fused", "muon, or one of transformers' optimizers: adamw_torch_fused, adafactor, ...")
    muon_learning_rate: float | None = key(
        None, "Learning rate of the hidden matrices. Default: 0.2 x sqrt(hidden_size) x learning_rate.", MUON, gt=0
    )
    muon_momentum: float = key(0.95, "Momentum of the hidden matrices.", MUON, ge=0, lt=1)
    muon_weight_decay: float | None = key(
        None, "Weight decay of the hidden matrices. Default: weight_decay.", MUON, ge=0
    )

    global_batch_size: int | None = key(
        None, "Rows per step over all devices, which sets gradient_accumulation_steps.", NO_TOKEN_LIMIT, ge=1
    )
    context_parallel_size: int = key(1, "Processes that share each batch, a packed row, and so its activations.", ge=1)
    context_parallel_head_stride: int | None = key(
        None, "Key and value heads exchanged at a time: fewer take less memory. Default: all.", CONTEXT, ge=1
    )
    resume_from_checkpoint: str = key(
        "auto", "auto: from the last complete checkpoint in output_dir. never: start anew. Or a path."
    )
    verify_model: bool = key(
        True, "Before the first step, compare what will train with the model's own forward on two short documents."
    )
    dry_run: bool = key(False, "Print what the run would do and take, and what is wrong with it; train nothing.")
    force_resume: bool = key(False, "Resume although the model, the data or the seed changed.")
    early_stopping_patience: int | None = key(
        None,
        "End after this many evaluations in a row without a better metric_for_best_model.",
        EVALUATES,
        ge=1,
    )
    save_total_gb: float | None = key(
        None, "Delete the oldest checkpoints while all together are larger (GB).", SAVES, gt=0
    )
    wandb_entity: str | None = key(None, "Weights & Biases user or team.", WANDB)
    wandb_project: str | None = key(None, "Weights & Biases project.", WANDB)
    wandb_run_group: str | None = key(None, "Weights & Biases group of runs.", WANDB)
    callbacks: list[str] = key([], "Callbacks of your own: module:Class of a TrainerCallback, built without arguments.")
    push_to_hub_revision: bool = key(
        False, "Push each checkpoint to the branch <hub_revision>-step-<step>, the model to hub_revision."
    )
    overwrite_hub_revision: bool = key(False, "Push although the revision already holds a model.", PUSHES)
    hub_push_failure: Literal["warn", "raise"] = key("warn", "What a push that fails does to the run.", PUSHES)
    hub_push_to_main: bool = key(False, "Push the final model to main too.", PUSHES)

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu and not has_fast_bf16():
            self.bf16 = bool(self.bf16)
        if uses_fsdp():
            check_fsdp_device()
            check_fsdp(self)
            disable_fsdp_ram_efficient_loading()  # saves nothing, and fails on tied weights under PEFT
        if self.early_stopping_patience and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        # PATCH(transformers<5.25): `optim` is one of a fixed list, so another stands there while transformers checks
        # it. Waits for https://github.com/huggingface/transformers/issues/39537. Delete when muon is in the list.
        muon = self.optim == "muon"
        if muon:
            self.optim = "adamw_torch_fused"
        super().__post_init__()
        if muon:
            self.optim = "muon"
            check_muon(self)
        if self.context_parallel_size > 1 and (uses_parallelism_config() or self.parallelism_config is not None):
            raise ValueError(
                "`context_parallel_size` takes the place of accelerate's parallelism_config (cp_size, tp_size, ...), "
                "which is set too. Set one of them."
            )
        # Built once on nothing, so that arguments that the schedule does not take fail now and not after the data
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        assert not isinstance(self.lr_scheduler_kwargs, str)  # transformers has parsed it
        get_scheduler(self.lr_scheduler_type, optimizer, 1, 10, self.lr_scheduler_kwargs)
        batch, given = self.per_device_train_batch_size, self.gradient_accumulation_steps
        self.gradient_accumulation_steps = accumulation_steps(
            self.global_batch_size, batch, self.data_parallel_size, given
        )

    @property
    def data_parallel_size(self) -> int:
        """Return how many processes, or groups of them under context parallelism, have a batch of their own."""
        return max(1, self.world_size // self.context_parallel_size)


@dataclass
class CausalLMConfig(RunConfig):
    """The keys of SFT and DPO: benchmarks of each checkpoint, and generations at each evaluation."""

    benchmarks: list[str] = key([], "Run on each checkpoint: names in configs/benchmarks, or paths.")
    benchmark_launcher: Literal["local", "slurm"] = key(
        "local", "Where benchmarks run: subprocesses, or Slurm jobs.", "benchmarks"
    )
    benchmark_schedule: Literal["after", "beside", "evaluation"] | None = key(
        None,
        "After training, beside it, or at each evaluation. Default: as the best model and the devices need.",
        "benchmarks",
    )
    benchmark_devices: list[str] = key(
        [], "CUDA_VISIBLE_DEVICES of each benchmark that runs at a time.", "benchmarks", "benchmark_launcher: local"
    )
    benchmark_timeout: float = key(7200, "Seconds after which a benchmark is given up.", "benchmarks", gt=0)
    eval_prompts: list[str] = key(
        [], "Generate at each evaluation: prompts, a .txt or .jsonl file, or column:NAME.", EVALUATION
    )
    eval_generation_kwargs: dict[str, Any] | None = key(
        None, "Arguments of generate(); one may be a list of values to sweep.", "eval_prompts"
    )
    eval_metrics: list[str] = key(
        [], "module:function of (samples, prompts, outputs) -> {name: [values]}.", "eval_prompts"
    )
    stop_sequences: list[str] = key([], "Cut generations at these texts.", "eval_prompts")


@dataclass
class SFTConfig(CausalLMConfig, trl.SFTConfig):
    messages_column: str | None = key(
        None, "Column of whole conversations. Default: messages, or conversations.", TURNS
    )
    completion_column: str | None = key(
        None, "Column of the completion: text or messages. Default: completion.", TURNS, NO_MESSAGES
    )
    text_column: str | None = key(
        None, "Column of plain text, trained on throughout. Default: text.", NO_MESSAGES, NO_COMPLETION
    )
    last_turn_only_loss: bool = key(False, "Train on the last assistant turn of a conversation only.", TURNS)
    pretraining: bool = key(False, "Continue pre-training on text_column: no template, no EOS, loss on every token.")


@dataclass
class PreferenceConfig:
    """The keys of reward models and DPO: pairs, and their packing."""

    chosen_column: str | None = key(None, "Column of the preferred answer: text or messages. Default: chosen.")
    rejected_column: str | None = key(None, "Column of the other answer: text or messages. Default: rejected.")
    packing: bool = key(False, "Drop the padding: run a batch as one packed row. Same numbers, faster.")
    share_prefix: bool | None = key(
        None, "Run the prompt that chosen and rejected share once. Default: where that saves 5%.", PACKING
    )
    max_tokens_per_batch: int | None = key(
        None, "As many pairs per device as fit into this many packed tokens.", PACKING, ge=1
    )


@dataclass
class RewardConfig(PreferenceConfig, RunConfig, trl.RewardConfig):
    loss_type: Literal["sigmoid", "logexp"] = key(
        "sigmoid", "-logsigmoid(chosen - rejected), or log(1 + exp(rejected - chosen)): the same in exact arithmetic."
    )
    use_margin: bool = key(False, "Subtract margin_column from the reward difference.")
    margin_column: str | None = key(None, "Column of margins. Default: margin.", "use_margin: true")
    fp32_loss: bool = key(True, "Compute the loss in float32, whatever the model's dtype.")
    value_head_prefix: str = key("score", "Name of the reward head's module.", SCORE_HEAD)
    router_aux_loss_coef: float | None = key(None, "Weight of the load-balancing loss of a mixture of experts.", ge=0)
    calibrate_rewards: bool = key(False, "Store mean and std of the evaluation rewards in config.json.", EVALUATION)
    subset_column: str | None = key(None, "Also report evaluation accuracy by the values of this column.", EVALUATION)
    pair_benchmarks: list[str] = key(
        [], "Files of pairs (RewardBench's columns) to judge at each evaluation.", EVALUATION
    )


@dataclass
class DPOConfig(PreferenceConfig, CausalLMConfig, trl.DPOConfig):
    # TRL's SFTConfig and RewardConfig have these two; its DPOConfig does not (trl 1.16)
    chat_template_path: str | None = key(None, "Path of a .jinja file, or a tokenizer whose chat template to take.")
    eos_token: str | None = key(None, "Token that ends a turn or sequence. Default: the tokenizer's.")

    ipo_reduction: Literal["mean", "sum"] = key(
        "mean", "IPO on log-probabilities averaged over the answer's tokens (TRL), or summed.", "loss_type: ipo"
    )
    nll_loss_coef: float | None = key(
        None, "Weight of the chosen answer's negative log-likelihood: mean over tokens, then rows.", ge=0
    )
    ref_model_name_or_path: str | None = key(None, "Reference model. Default: the model as it was before training.")
    ref_model_revision: str = key("main", "Revision of ref_model_name_or_path.", "ref_model_name_or_path")
    ref_offload: bool = key(
        False, "Keep the reference model on the CPU between its passes.", NO_PRECOMPUTED, OTHER_REFERENCE
    )


def has_fast_bf16() -> bool:
    """Return whether this CPU has bf16 instructions. Without them a bf16 matmul is ~80x slower than one in float32 (1.6
    against 136 GFLOP/s on two cores), with them ~4x faster (1,320 against 330)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def count_groups(processes: int, context_parallel_size: int) -> int:
    """Return the number of groups of processes that have a batch of their own.

    Raises:
        ValueError: when the processes cannot be divided so.
    """
    groups, rest = divmod(processes, context_parallel_size)
    if rest:
        raise ValueError(
            f"`context_parallel_size` {context_parallel_size} does not divide the {processes} processes into groups. "
            "Set it to a divisor of their number, or start a multiple of it (--num_processes)."
        )
    return groups


def accumulation_steps(global_batch: int | None, per_device: int, world_size: int, given: int) -> int:
    """Return the micro-batches per step, so that `per_device * world_size * steps == global_batch`.

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
