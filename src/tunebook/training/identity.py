"""What a run is made of, for its checkpoints: with other weights or other trained parameters it is another run."""

from pathlib import Path

import xxhash
from transformers import PreTrainedConfig
from transformers.training_args import OptimizerNames
from transformers.utils import find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from ..checkpoints import Record
from ..environment import launched_sharding
from ..recipe import Recipe
from ..recipe.configs import DPOConfig, SFTConfig
from .models import check_model

BLOCK = 2**16  # bytes
BLOCKS = 64  # that are sampled of a model's files, in all
HEADER = 2**20  # bytes of a file's header that are read at most
# Keys that decide which parameters are trained, and what the saved ones mean
ADAPTER = (
    *("lora_r", "lora_alpha", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
    *("use_dora", "use_rslora"),
)


def describe_run(recipe: Recipe, config: PreTrainedConfig) -> Record:
    """Return what a run is made of, as far as it is known before the rows are read.

    Args:
        config: of the model.
    """
    args, model_args = recipe.training, recipe.model
    reference = None
    if isinstance(args, DPOConfig) and args.ref_model_name_or_path is not None:
        name = args.ref_model_name_or_path
        config_of = check_model(name, args.ref_model_revision, args.trust_remote_code)
        reference = identify_weights(name, vars(config_of).get("_commit_hash"))
    order: dict[str, object] = {"packing": args.packing, "train_sampling_strategy": args.train_sampling_strategy}
    order["dataloader_drop_last"] = args.dataloader_drop_last
    if isinstance(args, SFTConfig):
        order["shuffle_dataset"] = args.shuffle_dataset
        if args.packing:
            order |= {"packing_strategy": args.packing_strategy, "max_length": args.max_length}
    else:
        order["max_tokens_per_batch"] = args.max_tokens_per_batch
    trained = {"use_peft": model_args.use_peft, "num_layers_unfrozen": model_args.num_layers_unfrozen}
    adapter = None
    if model_args.adapter_name_or_path is not None:  # which decides what is trained
        file = find_adapter_config_file(model_args.adapter_name_or_path, revision=model_args.adapter_revision)
        adapter = identify_weights(model_args.adapter_name_or_path, extract_commit_hash(file, None))
    elif model_args.use_peft:
        trained |= {name: vars(model_args)[name] for name in ADAPTER}
    engine = launched_sharding(args).engine
    return {
        "task": recipe.task,
        "model": model_args.model_name_or_path,
        "weights": identify_weights(model_args.model_name_or_path, vars(config).get("_commit_hash")),
        "adapter": adapter,
        "reference": reference,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "order": order,
        "trained": trained,
        "optim": args.optim if args.optim == "muon" else OptimizerNames(args.optim).value,
        "engine": "none" if engine == "ddp" else engine,
        "learning_rate": args.learning_rate,
    }


def identify_weights(name: str, commit: str | None) -> str:
    """Return what tells a model's weights, or an adapter's, from others: the commit on the Hub; of a folder, a hash of
    the sizes of its files, their safetensors headers, and [`BLOCKS`] blocks that are spread evenly over each: a few MB
    in all."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{commit}"
    digest = xxhash.xxh3_64()
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf", "adapter_config.json")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    for path in files:
        size, count = path.stat().st_size, max(2, BLOCKS // len(files))
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(HEADER))
            for i in range(count):
                file.seek(max(0, size - BLOCK) * i // (count - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
