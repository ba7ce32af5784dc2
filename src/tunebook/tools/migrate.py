"""Settings of Open-R1, of the alignment-handbook and of OpenRLHF become a recipe, each changed line with what it was.

What cannot be carried over is listed, never dropped. docs/migrating.md is written from the tables below.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import RecipeError, user_errors
from ..files import read_yaml
from ..following.benchmarks import find_benchmark
from ..recipe import TASKS, find_task, parse, read_recipe
from ..recipe.parser import (
    OldKey,
    dead_keys,
    default,
    keys_of,
    old_keys,
    read_value,
    read_word,
    set_push_key,
    unknown_key,
)

Settings = Mapping[str, Any]
# (value, all settings) -> keys of the recipe; none: not carried over; None: carried over elsewhere
Convert = Callable[[Any, Settings], dict[str, Any] | None]
Condition = Callable[[Any, Settings], bool]


class Rule(NamedTuple):
    """What becomes of one setting."""

    keys: str = ""  # tunebook's; none: it is not carried over
    note: str = ""  # which values, or why it is not carried over
    convert: Convert | None = None  # None: the value as it is
    when: Condition | None = None  # where it is carried over; None: everywhere
    older: str | None = ""  # the setting's names in older versions; empty: its last part; None: there was none
    otherwise: str = "off, or without effect there"  # why it is not carried over elsewhere
    caveat: str = ""  # what is not the same, for a comment in the recipe


@dataclass
class Migration:
    """A recipe, with what each key of it was, what is not carried over, and what must be filled in."""

    task: str
    source: str
    launch: str
    recipe: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)  # setting -> why
    to_do: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, rule: Rule, settings: Settings, form: str, given: bool = True) -> None:
        """Carry one setting over. `form`: how the setting is shown; `given`: it is not a default."""
        setting = shown(name, value, form)
        try:
            keys = {}
            if rule.keys and (rule.when is None or rule.when(value, settings)):
                keys = rule.convert(value, settings) if rule.convert else {rule.keys: value}
        except (TypeError, ValueError, KeyError, AttributeError):
            self.left[setting] = f"not a value of {name}"
            return
        if keys == {} and given:
            self.left[setting] = rule.otherwise if rule.keys else rule.note
        origin = setting + (f"; {rule.caveat}" if rule.caveat else "")
        for key, new in (keys or {}).items():
            if self.recipe.setdefault(key, new) != new:
                self.left[setting] = f"the recipe has {shown(key, self.recipe[key], f'{key}: {{}}')} already"
            elif form.startswith("--") or (key, new) != (name, value):
                self.origins[key] = f"{self.origins[key]}, {origin}" if key in self.origins else origin

    def check(self) -> None:
        """Move keys that the recipe's parser refuses, or that have no effect, out of the recipe."""
        known = {name: entry for cls in TASKS[self.task] for name, entry in keys_of(cls).items()}
        values = {"task": self.task} | {name: default(entry) for name, (entry, _) in known.items()}
        for name, value in list(self.recipe.items()):
            try:
                if name not in known:
                    raise RecipeError(unknown_key(self.task, name))
                values[name] = read_value(name, value, *known[name])
            except RecipeError as error:
                self.drop(name, str(error))
        while dead := dead_keys(self.recipe, values):
            for name, fix in dead.items():
                self.drop(name, f"`{name}` would have no effect. It needs {fix}.")
                values[name] = default(known[name][0])
        written = read_yaml(str(self), "the recipe")
        try:
            parse(self.task, {name: value for name, value in written.items() if name not in OF_THE_MACHINE})
        except RecipeError as error:
            self.to_do += str(error).splitlines()

    def drop(self, name: str, why: str) -> None:
        value = self.recipe.pop(name)
        self.left[self.origins.pop(name, None) or shown(name, value, f"{name}: {{}}")] = why

    def remarks(self) -> list[str]:
        lists = {
            "Not carried over": [f"{setting}: {why}" for setting, why in self.left.items()],
            "To be mended": self.to_do,
        }
        return [line for title, lines in lists.items() if lines for line in (f"{title}:", *(f"  {x}" for x in lines))]

    def __str__(self) -> str:
        head = [f"From {self.source}. Behind a key that was another stands what it was.", self.launch]
        lines = [f"# {line}" for line in head]
        for name, value in self.recipe.items():
            flow = None if isinstance(value, list | dict) else False
            options = {"sort_keys": False, "allow_unicode": True, "width": 10**9, "default_flow_style": flow}
            text = yaml.dump({name: value}, Dumper=Dumper, **options).rstrip("\n")
            origin = self.origins.get(name)
            if origin and "\n" in text:
                lines += [f"# {origin}", text]
            else:
                lines.append(f"{text}  # {origin}" if origin else text)
        return "\n".join(lines + [f"# {line}" for line in self.remarks()]) + "\n"


class Dumper(yaml.SafeDumper):
    """Text of several lines stays so."""


Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def shown(name: str, value: Any, form: str) -> str:
    """A setting in one line, without a secret."""
    if form.startswith("--") and value is True:
        return form.format("").rstrip()
    text = (
        " ".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else json.dumps(value)
    )
    text = "***" if name in SECRETS else text.replace("\n", "\\n")
    return form.format(text if len(text) < 80 else "...")


# Checked where the recipe is launched: it depends on the GPU
OF_THE_MACHINE = {"tf32"}
SECRETS = {"hub_token", "push_to_hub_token", "wandb_api_key", "logger.wandb.key", "use_wandb"}

# ---- Open-R1 and the alignment-handbook: recipes in YAML -----------------------------------------------------------


def only(condition: Any, **keys: Any) -> dict[str, Any]:
    return keys if condition else {}


def fixed(**keys: Any) -> Convert:
    return lambda value, settings: keys


def given(value: Any, settings: Settings) -> bool:
    return bool(value)


def share_of(split: str, share: float) -> str:
    """The first rows of a split, as `datasets` writes it, in whole percent."""
    return split if share >= 1 else f"{split}[:{ceil(100 * share)}%]"


def mixture(value: Mapping, settings: Settings) -> dict[str, Any]:
    names = {"id": "path", "config": "name", "columns": "columns"}
    sources = [
        {names[name]: source[name] for name in names if source.get(name) is not None}
        | {"split": share_of(source.get("split", "train"), source.get("weight", 1))}
        for source in value["datasets"]
    ]
    size = value.get("test_split_size")
    return {"datasets": sources} | ({} if size is None else {"test_split_size": of_each(size, len(sources))})


def of_each(size: float, sources: int) -> float:
    """They split the mixture, we each source of it."""
    return size if size < 1 else max(1, round(size / sources))


def mixer(value: Mapping[str, float], settings: Settings) -> dict[str, Any]:
    train = next((name for name in settings.get("dataset_splits", []) if "train" in name), "train")
    configs = settings.get("dataset_configs") or [None] * len(value)
    sources = [
        {"path": path, "split": share_of(train, share)} | ({} if name is None else {"name": name})
        for (path, share), name in zip(value.items(), configs, strict=True)
    ]
    if len(sources) > 1:
        return {"datasets": sources}
    [source] = sources
    named = {"dataset_name": "path", "dataset_config": "name", "dataset_train_split": "split"}
    return {key: source[name] for key, name in named.items() if name in source}


def test_split(value: Sequence[str], settings: Settings) -> dict[str, Any]:
    tests = [name for name in value if "test" in name]
    if len(tests) != 1 or len(settings.get("dataset_mixer", {})) != 1:
        return {}
    return {"dataset_test_split": tests[0]}


def known_benchmarks(value: list[str], settings: Settings) -> bool:
    try:
        return all(map(find_benchmark, value))
    except ValueError:
        return False


def plain(old: OldKey) -> Rule:
    """Return the rule of a key that was renamed, or is to be replaced by hand."""
    return Rule(old.new or "", old.note)


HANDBOOK: dict[str, Rule] = {name: plain(old) for name, old in old_keys().items()} | {
    "dataset_mixture": Rule(
        "datasets, test_split_size",
        "id: path; config: name; weight: part of the split, in percent; the seed is the recipe's",
        mixture,
        caveat="a weight takes the first rows, rounded up to whole percent, there random ones; a test_split_size in "
        "rows is shared by the sources",
    ),
    "dataset_mixer": Rule(
        "dataset_name or datasets", "with dataset_splits and dataset_configs; a share -> the first percent", mixer
    ),
    "dataset_configs": Rule(
        "dataset_config", "name in each entry of datasets", lambda v, s: mixer(s["dataset_mixer"], s)
    ),
    "dataset_splits": Rule(
        "dataset_train_split, dataset_test_split",
        convert=test_split,
        otherwise="the training split is in datasets; set eval_dataset_name to one test set",
    ),
    "overwrite_output_dir": Rule(note="they resume whatever it says; to start anew, resume_from_checkpoint: never"),
    "use_flash_attention_2": Rule(
        "attn_implementation", "flash_attention_2", fixed(attn_implementation="flash_attention_2"), given
    ),
    "packing_strategy": Rule(
        "packing_strategy", "ffd: bfd", lambda v, s: {"packing_strategy": v.replace("ffd", "bfd")}
    ),
    "padding_free": Rule(
        "packing",
        "in DPO",
        when=lambda v, s: v and s["task"] == "dpo",
        otherwise="set packing: true, which packs several rows into one",
    ),
    "push_to_hub": Rule(
        "push_to_hub",
        when=lambda v, s: not (s.get("push_to_hub_revision") or s.get("callbacks")),
        otherwise="push_to_hub_revision pushes every checkpoint",
    ),
    "hub_token": Rule(note=old_keys()["push_to_hub_token"].note),
    "benchmarks": Rule(
        "benchmarks", "of configs/benchmarks", when=known_benchmarks, otherwise="not all in configs/benchmarks"
    ),
}


def migrate_yaml(path: Path, task: str) -> Migration:
    settings = set_push_key(read_recipe(path))
    done = Migration(task, path.name, launch_command(task, "zero3"))
    for name, value in settings.items():
        done.add(name, value, HANDBOOK.get(name, Rule(name)), settings | {"task": task}, f"{name}: {{}}")
    return done


# ---- OpenRLHF: a command line --------------------------------------------------------------------------------------


def trackers(value: Any, settings: Settings) -> dict[str, Any]:
    names = {"logger.wandb.key": "wandb", "logger.tensorboard_dir": "tensorboard"}
    return {"report_to": [tracker for name, tracker in names.items() if settings.get(name)]}


def sources(value: str, settings: Settings) -> dict[str, Any]:
    """`a,b@folder`, and data.dataset_probs `0.7,0.3`."""
    split = settings["data.dataset_split"]
    found = [dict(zip(("path", "data_dir"), part.strip().split("@"), strict=False)) for part in str(value).split(",")]
    if len(found) == 1 and "data_dir" not in found[0]:
        return {"dataset_name": found[0]["path"]}
    shares = [float(share) for share in str(settings.get("data.dataset_probs", "")).split(",") if share]
    found = [source | only(split != "train", split=split) for source in found]
    if len(found) == 1 or len(shares) != len(found):
        return {"datasets": found}
    shared = [source | {"probability": share / sum(shares)} for source, share in zip(found, shares, strict=True)]
    return {"datasets": shared, "mixture_stopping": "all_exhausted"}


def sft_rows(settings: Settings) -> dict[str, Any]:
    """Which columns, and which loss: data.input_key, data.output_key, data.apply_chat_template, data.multiturn."""
    column, answer = settings["data.input_key"], settings.get("data.output_key")
    if settings.get("model.pretrain_mode_enable"):
        return {"pretraining": True, "text_column": column}
    if answer is not None:
        columns = {"prompt_column": column, "completion_column": answer}
        return columns | only(settings.get("data.apply_chat_template"), apply_chat_template=True)
    if settings.get("data.apply_chat_template"):
        loss = "assistant_only_loss" if settings.get("data.multiturn") else "last_turn_only_loss"
        return {"messages_column": column, loss: True}
    return {"prompt_column": column}


def rows(*names: str) -> Convert:
    """Those of a row's keys that a setting decides."""

    def convert(value: Any, settings: Settings) -> dict[str, Any]:
        found = sft_rows(settings) if settings["task"] == "sft" else {"apply_chat_template": value}
        return {name: found[name] for name in names if name in found}

    return convert


def steps(name: str, otherwise: str) -> Convert:
    """save_steps and eval_steps; -1 is `otherwise`."""
    return lambda value, settings: (
        {f"{name}_strategy": "steps", f"{name}_steps": value} if value > 0 else {f"{name}_strategy": otherwise}
    )


def lora(value: Any, settings: Settings) -> bool:
    return settings.get("ds.lora.rank", 0) > 0


def muon(value: Any, settings: Settings) -> bool:
    return settings.get("optim") == "muon"


def saves(value: Any, settings: Settings) -> bool:
    return settings["ckpt.save_steps"] > 0


def evaluates(value: Any, settings: Settings) -> bool:
    return "eval.dataset" in settings


def wandb(value: Any, settings: Settings) -> bool:
    return "logger.wandb.key" in settings


def above_zero(value: float, settings: Settings) -> bool:
    return value > 0


DEEPSPEED = Rule(note="DeepSpeed's: for a JSON that a file of configs/accelerate names (deepspeed_config_file)")

OPENRLHF: dict[str, Rule] = {
    "model.model_name_or_path": Rule("model_name_or_path", older="pretrain"),
    "ref.model_name_or_path": Rule("ref_model_name_or_path", older="ref_pretrain"),
    "ref.offload": Rule("ref_offload", older="ref_offload"),
    "ds.attn_implementation": Rule("attn_implementation"),
    "flash_attn": Rule(
        "attn_implementation", "flash_attention_2", fixed(attn_implementation="flash_attention_2"), given
    ),
    "ds.experts_implementation": Rule(
        "model_init_kwargs", convert=lambda v, s: {"model_init_kwargs": {"experts_implementation": v}}, older=None
    ),
    "ds.use_liger_kernel": Rule("use_liger_kernel"),
    "ds.lora.rank": Rule(
        "use_peft, lora_r", convert=lambda v, s: {"use_peft": True, "lora_r": v}, when=above_zero, older="lora_rank"
    ),
    "ds.lora.alpha": Rule("lora_alpha", when=lora, older="lora_alpha"),
    "ds.lora.dropout": Rule("lora_dropout", when=lora, older="lora_dropout"),
    "ds.lora.target_modules": Rule("lora_target_modules", when=lora),
    "ds.load_in_4bit": Rule(
        "load_in_4bit, use_bnb_nested_quant", convert=fixed(load_in_4bit=True, use_bnb_nested_quant=True), when=given
    ),
    "ds.value_head_prefix": Rule("value_head_prefix"),
    "model.aux_loss_coef": Rule("router_aux_loss_coef", when=above_zero),
    "data.dataset": Rule("dataset_name or datasets", "a,b: a mixture; path@folder: data_dir", sources),
    "data.dataset_probs": Rule(
        "datasets",
        "probability in each entry",
        lambda v, s: sources(s["data.dataset"], s),
        when=lambda v, s: "," in str(s.get("data.dataset")),
    ),
    "data.dataset_split": Rule(
        "dataset_train_split",
        "split in each entry of datasets",
        lambda v, s: (
            None if v == "train" or "datasets" in sources(s["data.dataset"], s) else {"dataset_train_split": v}
        ),
        older="train_split dataset_split",
    ),
    "data.max_samples": Rule("max_train_samples"),
    "data.input_key": Rule(
        "prompt_column, messages_column or text_column",
        "with an output_key, of conversations, with pretrain_mode",
        rows("prompt_column", "messages_column", "text_column"),
    ),
    "data.output_key": Rule("completion_column", convert=rows("completion_column")),
    "data.input_template": Rule(
        "prompt_template",
        when=lambda v, s: (
            "{}" in v and not s.get("data.apply_chat_template") and not s.get("model.pretrain_mode_enable")
        ),
    ),
    "data.apply_chat_template": Rule(
        "apply_chat_template", convert=rows("apply_chat_template", "messages_column", "last_turn_only_loss")
    ),
    "data.multiturn": Rule("assistant_only_loss", convert=rows("assistant_only_loss")),
    "data.tokenizer_chat_template": Rule("chat_template"),
    "data.prompt_key": Rule("prompt_column"),
    "data.chosen_key": Rule("chosen_column"),
    "data.rejected_key": Rule("rejected_column"),
    "data.max_len": Rule("max_length"),
    "eval.dataset": Rule(
        "eval_dataset_name", when=lambda v, s: "," not in v, older="eval_dataset", otherwise="name one data set"
    ),
    "eval.split": Rule("dataset_test_split", when=evaluates, older="eval_split"),
    "eval.steps": Rule("eval_strategy, eval_steps", "-1: epoch", steps("eval", "epoch"), evaluates, "eval_steps"),
    "model.pretrain_mode_enable": Rule("pretraining", convert=rows("pretraining"), older="pretrain_mode"),
    "model.loss_type": Rule("loss_type", older="loss"),
    "model.margin_loss_enable": Rule("use_margin", older="margin_loss"),
    "model.compute_fp32_loss_enable": Rule("fp32_loss", older="compute_fp32_loss"),
    "model.beta": Rule("beta"),
    "model.ipo_enable": Rule(
        "loss_type, ipo_reduction", "ipo, sum", fixed(loss_type="ipo", ipo_reduction="sum"), given, "ipo"
    ),
    "model.label_smoothing": Rule("label_smoothing"),
    "model.nll_loss_coef": Rule("nll_loss_coef", when=above_zero),
    "ckpt.output_dir": Rule("output_dir", older="save_path"),
    "train.max_epochs": Rule("num_train_epochs"),
    "train.batch_size": Rule("global_batch_size", older="train_batch_size"),
    "train.micro_batch_size": Rule(
        "per_device_train_batch_size, per_device_eval_batch_size",
        convert=lambda v, s: (
            {"per_device_train_batch_size": v} | only(s.get("eval.dataset"), per_device_eval_batch_size=v)
        ),
        older="micro_train_batch_size",
    ),
    "ds.packing_samples": Rule("packing", caveat="in SFT a step is then that many packed rows, not samples"),
    "ds.ring_attn_size": Rule("context_parallel_size"),
    "ds.ring_attn_head_stride": Rule("context_parallel_head_stride", older="ring_head_stride"),
    "model.gradient_checkpointing_enable": Rule("activation_checkpointing", older="gradient_checkpointing"),
    "model.gradient_checkpointing_reentrant": Rule(
        "activation_checkpointing_kwargs",
        convert=fixed(activation_checkpointing_kwargs={"use_reentrant": True}),
        when=given,
        older="gradient_checkpointing_use_reentrant",
    ),
    "ds.param_dtype": Rule("bf16 or fp16", convert=lambda v, s: {v: True}),
    "bf16": Rule("bf16"),
    "optim": Rule("optim", "adam: adamw_torch_fused", lambda v, s: {"optim": {"adam": "adamw_torch_fused"}.get(v, v)}),
    "muon.lr": Rule("muon_learning_rate", when=muon, older=None),
    "muon.momentum": Rule("muon_momentum", when=muon, older=None),
    "muon.ns_steps": Rule(note="always 5, as in DeepSpeed", older=None),
    "muon.nesterov": Rule(note="always, as in DeepSpeed", older=None),
    "muon.no_nesterov": Rule(note="Nesterov's momentum always, as in DeepSpeed", older=None),
    "adam.lr": Rule("learning_rate", older="learning_rate"),
    "adam.betas": Rule(
        "adam_beta1, adam_beta2", convert=lambda v, s: {"adam_beta1": v[0], "adam_beta2": v[1]}, older="adam_betas"
    ),
    "adam.eps": Rule("adam_epsilon", older=None),
    "adam.weight_decay": Rule("weight_decay", older="l2"),
    "lr_scheduler": Rule("lr_scheduler_type"),
    "lr_warmup_ratio": Rule("warmup_steps", "below 1 a share of all steps"),
    "min_lr_ratio": Rule(
        "lr_scheduler_kwargs",
        "min_lr_rate",
        lambda v, s: {"lr_scheduler_kwargs": {"min_lr_rate": v}},
        when=lambda v, s: s["lr_scheduler"] == "cosine_with_min_lr",
    ),
    "max_norm": Rule("max_grad_norm"),
    "train.seed": Rule("seed"),
    "train.full_determinism_enable": Rule("full_determinism", older="full_determinism"),
    "data.dataloader_num_workers": Rule("dataloader_num_workers"),
    "ckpt.save_steps": Rule("save_strategy, save_steps", "-1: no", steps("save", "no")),
    "ckpt.max_num": Rule("save_total_limit", when=saves, older="max_ckpt_num"),
    "ckpt.max_mem": Rule("save_total_gb", when=saves, older="max_ckpt_mem"),
    "ckpt.disable_ds": Rule("save_only_model", when=saves, older="disable_ds_ckpt"),
    "ckpt.load_enable": Rule(
        "resume_from_checkpoint", "auto", fixed(resume_from_checkpoint="auto"), given, "load_checkpoint"
    ),
    "ckpt.save_hf": Rule(note="every checkpoint can be loaded by transformers", older="save_hf_ckpt"),
    "ckpt.path": Rule(note="checkpoints stand in output_dir", older="ckpt_path"),
    "ds.use_universal_ckpt": Rule(note=DEEPSPEED.note, older="use_ds_universal_ckpt"),
    "logger.logging_steps": Rule("logging_steps"),
    "logger.wandb.key": Rule("report_to", "wandb", trackers, given, "use_wandb", caveat="the key: wandb login"),
    "logger.wandb.org": Rule("wandb_entity", when=wandb, older="wandb_org"),
    "logger.wandb.group": Rule("wandb_run_group", when=wandb, older="wandb_group"),
    "logger.wandb.project": Rule("wandb_project", when=wandb, older="wandb_project"),
    "logger.wandb.run_name": Rule("run_name", older="wandb_run_name"),
    "logger.tensorboard_dir": Rule(
        "report_to",
        "tensorboard",
        trackers,
        given,
        "use_tensorboard",
        caveat="the folder: TENSORBOARD_LOGGING_DIR in the environment",
    ),
    "ds.zero_stage": Rule(
        "accelerate launch --config_file",
        "configs/accelerate/ddp.yaml, zero1.yaml, zero2.yaml or zero3.yaml",
        lambda v, s: None,
    ),
    "ds.adam_offload": Rule(
        "accelerate launch --config_file",
        "configs/accelerate/zero3_offload.yaml",
        lambda v, s: None,
        when=lambda v, s: s["ds.zero_stage"] == 3,
        otherwise="put offload_optimizer_device: cpu into the deepspeed_config of configs/accelerate",
    ),
    "local_rank": Rule(note="accelerate launch sets it"),
    "ds.tensor_parallel_size": Rule(note=DEEPSPEED.note, older="ds_tensor_parallel_size"),
    "ds.zpg": DEEPSPEED,
    "ds.grad_accum_dtype": DEEPSPEED,
    "ds.overlap_comm": DEEPSPEED,
    "ds.deepcompile": DEEPSPEED,
    "disable_trace_cache": DEEPSPEED,
    "data.disable_fast_tokenizer": Rule(note="the loss masks need the fast tokenizer"),
    "use_ms": Rule(note="models and data come from the Hub or from disk"),
}

# OpenRLHF's defaults that are not tunebook's: the same for the three tasks, and those of each
DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "data.dataset_split": "train",
        "data.input_key": "input",
        "data.max_samples": 1000000,
        "ckpt.output_dir": "./ckpt",
        "ckpt.save_steps": -1,
        "ckpt.max_num": 3,
        "eval.steps": -1,
        "logger.logging_steps": 1,
        "train.batch_size": 128,
        "adam.betas": [0.9, 0.95],
        "muon.lr": 0.02,
        "lr_scheduler": "cosine_with_min_lr",
        "lr_warmup_ratio": 0.03,
        "min_lr_ratio": 0.1,
        "model.gradient_checkpointing_enable": False,
        "ds.lora.alpha": 16,
        "ds.lora.dropout": 0.0,
        "ds.lora.target_modules": "all-linear",
        "ds.zero_stage": 2,
    },
    "sft": {
        "train.max_epochs": 2,
        "train.micro_batch_size": 8,
        "adam.lr": 5e-6,
        "data.max_len": 2048,
        "data.input_template": "User: {}\nAssistant: ",
        "eval.split": "train",
    },
    "rm": {
        "train.max_epochs": 1,
        "train.micro_batch_size": 1,
        "adam.lr": 9e-6,
        "data.max_len": 512,
        "eval.split": "train",
    },
    "dpo": {
        "train.max_epochs": 1,
        "train.micro_batch_size": 8,
        "adam.lr": 1e-5,
        "data.max_len": 512,
        "eval.split": "test",
    },
}


def older_names(name: str, rule: Rule) -> list[str]:
    return [] if rule.older is None else (rule.older or name.rpartition(".")[2]).split()


COMMAND = re.compile(r"train_(sft|rm|dpo)(?:\.py)?(?=\s|$)")


def find_command(text: str, task: str | None) -> tuple[str, list[str]]:
    """The task and the arguments of the one OpenRLHF command in a text, such as a shell script.

    Raises:
        RecipeError: when there is none, more than one, or one for another task.
    """
    text = re.sub(r"\\\n", " ", text)
    found = [m for m in COMMAND.finditer(text) if "#" not in text[text.rfind("\n", 0, m.start()) + 1 : m.start()]]
    if task:
        found = [match for match in found if match[1] == task]
    if len(found) != 1:
        raise RecipeError(
            f"One command openrlhf.cli.train_sft, train_rm or train_dpo is needed; found: {len(found)}."
            + " Give --task." * (len(found) > 1)
        )
    rest = text[found[0].end() :]
    # Bash's $'...' knows escapes; shlex does not. The 2 of 2>&1 is no value of the last flag.
    rest = re.sub(r"\$'((?:[^'\\]|\\.)*)'", lambda m: shlex.quote(m[1].replace("\\n", "\n").replace("\\'", "'")), rest)
    rest = re.sub(r"(?<=\s)\d(?=>)", "", rest)
    ends = ";<>|&()\n"
    lexer = shlex.shlex(rest, posix=True, punctuation_chars=ends)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    with user_errors():
        words = list(takewhile(lambda word: word[:1] != "#" and (not word or set(word) - set(ends)), lexer))
    return found[0][1], words


def read_flags(words: Iterable[str]) -> dict[str, Any]:
    """As argparse would: `--flag`, `--flag value`, `--flag a b`, `--flag=value`."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = values = [value] if equals else []
        elif not flags:
            raise RecipeError(f"Unexpected argument {word!r}: OpenRLHF's flags are written --flag value.")
        else:
            values.append(word)
    parsed = {name: [read_word(value) for value in values] for name, values in flags.items()}
    return {name: True if not values else values[0] if len(values) == 1 else values for name, values in parsed.items()}


def migrate_command(text: str, task: str | None, source: str) -> Migration:
    task, words = find_command(text, task)
    older = {old: name for name, rule in OPENRLHF.items() for old in older_names(name, rule)}
    said = {older.get(name, name): (f"--{name} {{}}", value) for name, value in read_flags(words).items()}
    flags = {name: flag for name, flag in said.items() if not re.search(r"\$[\w{(]", str(flag[1]))}
    left = {
        shown(name, value, form): "a variable of the shell" for name, (form, value) in said.items() if name not in flags
    }
    settings = DEFAULTS[""] | DEFAULTS[task] | {name: value for name, (_, value) in flags.items()} | {"task": task}
    stage, offload = settings["ds.zero_stage"], settings.get("ds.adam_offload")
    sharding = f"zero{stage}{'_offload' if offload and stage == 3 else ''}" if stage else "ddp"
    done = Migration(task, source, launch_command(task, sharding), left=left)
    for name, rule in OPENRLHF.items():
        if name in flags:
            form, value = flags[name]
            done.add(name, value, rule, settings, form)
        elif name in settings:
            done.add(name, settings[name], rule, settings, f"default of --{name}", given=False)
    for name in flags.keys() - OPENRLHF.keys():
        done.left[shown(name, flags[name][1], flags[name][0])] = "not a flag of OpenRLHF's SFT, RM or DPO"
    return done


# ---- Both ----------------------------------------------------------------------------------------------------------


def launch_command(task: str, sharding: str) -> str:
    return f"accelerate launch --config_file configs/accelerate/{sharding}.yaml src/{task}.py --config RECIPE.yaml"


def migrate(source: str, task: str | None = None) -> Migration:
    """A recipe from a YAML recipe of Open-R1 or the alignment-handbook, an OpenRLHF command, or a script with one.

    Raises:
        RecipeError: when `source` is none of them, or its task is not known.
    """
    if COMMAND.search(source):
        done = migrate_command(source, task, "OpenRLHF")
    elif (path := Path(source)).suffix in (".yaml", ".yml"):
        done = migrate_yaml(path, find_task(path, task))
    elif path.is_file():
        done = migrate_command(path.read_text(encoding="utf-8"), task, path.name)
    else:
        raise RecipeError(
            f"{source}: not a file, and not a command with openrlhf.cli.train_sft, train_rm or train_dpo."
        )
    done.check()
    return done


def tables() -> str:
    """The part of docs/migrating.md from its first table on."""

    def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
        lines = [columns, ["---"] * len(columns), *rows]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

    def code(names: str) -> str:
        return re.sub(r"(, | or )", r"`\1`", f"`{names}`") if names else ""

    def target(rule: Rule) -> list[str]:
        return [code(rule.keys), "; ".join(filter(None, (rule.note, rule.caveat)))]

    def flags(names: Iterable[str]) -> str:
        return code(", ".join(f"--{name}" for name in names))

    handbook = ([code(name), *target(rule)] for name, rule in HANDBOOK.items())
    openrlhf = ([flags([name]), flags(older_names(name, rule)), *target(rule)] for name, rule in OPENRLHF.items())
    return (
        "## Open-R1 and the alignment-handbook\n\n"
        + table(["key", "tunebook", "note"], handbook)
        + "\n## OpenRLHF\n\n"
        + table(["flag", "before 0.10", "tunebook", "note"], openrlhf)
    )
