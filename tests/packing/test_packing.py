"""Packed and prefix-shared training is TRL's padded training: log-probs, metrics, losses and gradients."""

import copy
import functools
import itertools
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import transformers
import trl
import trl.trainer.utils
from accelerate.data_loader import skip_first_batches
from conftest import build_model, build_tokenizer, save_model
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import add_fused_lm_head

from tunebook.packing import attention
from tunebook.packing.batches import TokenBatchSampler, pair_lengths
from tunebook.packing.forward import pack_causal_lm, pack_reward_model, pack_rows
from tunebook.packing.log_probs import LogProbs, _LinearLogProbs

VOCAB = 61
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SIZES = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=64, pad_token_id=0, initializer_range=0.3)
GQA = dict(num_key_value_heads=2)
SOFT_CAPS = dict(attn_logit_softcapping=4.0, final_logit_softcapping=3.0)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, output_router_logits=True)
MODELS = {
    "Llama": ("Llama", GQA),
    "Llama without biases, head tied": ("Llama", GQA | dict(tie_word_embeddings=True)),
    "Qwen2": ("Qwen2", GQA),
    "Qwen3": ("Qwen3", GQA | dict(head_dim=8)),
    "Mistral": ("Mistral", GQA | dict(sliding_window=None)),
    "Mistral with a window": ("Mistral", GQA | dict(sliding_window=4)),
    "Gemma 2, soft-capped": ("Gemma2", GQA | SOFT_CAPS | dict(head_dim=8, sliding_window=4)),
    "GPT-NeoX": ("GPTNeoX", {}),
    "Qwen3 MoE": ("Qwen3Moe", GQA | MOE | dict(head_dim=8, router_aux_loss_coef=0.1)),
}
PACKINGS = {"padded": (False, False), "packed": (True, False), "shared": (True, True)}


def build(name: str, task: str = "ForCausalLM"):
    """A model of `MODELS`; a causal one has TRL's head, which returns `FIELDS` instead of logits."""
    torch.manual_seed(0)
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SIZES, **changes)
    config.num_labels = 1 if task == "ForSequenceClassification" else 2
    model = getattr(transformers, f"{family}{task}")(config).train()
    if task == "ForCausalLM":
        add_fused_lm_head(model, outputs=FIELDS)
    return model


tokens = st.lists(st.integers(1, 5), max_size=7)  # few tokens, so that completions often start alike


@st.composite
def pairs(draw):
    """Prompt, chosen, rejected, of any lengths: no prompt, equal sides, one side the start of the other among them."""
    prompt, chosen = draw(tokens), draw(tokens.filter(len))
    kind = draw(st.sampled_from(["any", "equal", "cut"]))
    cut = len(chosen) if kind == "equal" else draw(st.integers(1, len(chosen)))
    rejected = draw(tokens.filter(len)) if kind == "any" else chosen[:cut]
    return prompt, chosen, rejected


batches = st.lists(pairs(), min_size=1, max_size=4)


SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")


def collate(rows, left: bool = False, max_length: int | None = None):
    """TRL's preference batch as (input_ids, attention_mask, labels); optionally padded on the left."""
    collator = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    batch = collator([dict(zip(SIDES, row, strict=True)) for row in rows])
    if left:
        order = batch["attention_mask"].argsort(dim=1, stable=True)
        batch = {name: x.gather(1, order) for name, x in batch.items()}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    labels[batch["attention_mask"].cumsum(dim=1) == 1] = -100  # nothing predicts a row's first token
    return dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_gradients(gradients, expected, rtol=1e-4):
    """Each relative to its largest element, or to a hundredth of the model's largest where it cancels out."""
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.abs().max(), largest / 100).item()
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=rtol * scale, msg=name)


@settings(deadline=None)
@given(rows=batches, left=st.booleans(), share_prefix=st.booleans())
def test_every_token_keeps_its_place_and_its_document(rows, left, share_prefix):
    batch = collate(rows, left)
    real = batch["attention_mask"].bool()
    packed, source = pack_rows(batch["input_ids"], batch["attention_mask"], share_prefix)
    assert torch.equal(packed["input_ids"][0, source[real]], batch["input_ids"][real])
    assert torch.equal(packed["position_ids"][0, source[real]], (real.cumsum(1) - 1)[real])
    keys = packed["key_index"] if share_prefix else torch.arange(packed["input_ids"].shape[1])
    for row, start, end in zip(source, *(packed["cu_seq_lens_k"][i:][: len(real)] for i in (0, 1)), strict=True):
        position = packed["position_ids"][0, keys[start:end]]
        assert torch.equal(position, torch.arange(len(position))), "keys are not one document's tokens in order"
        assert set(keys[start:end].tolist()) >= set(row[row > 0].tolist())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", PACKINGS)
def test_causal_lm_equals_trl_padded(name, mode):
    """Per-token fields, loss, load-balancing loss, and gradients of a random function of them."""
    model, expected_model = build(name), build(name)
    pack_causal_lm(model, *PACKINGS[mode])

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rows=batches, left=st.booleans(), max_length=st.sampled_from([None, 8]))
    def check(rows, left, max_length):
        batch = collate(rows, left, max_length)
        # Left-padded rows need their positions, which TRL, padding right, does not pass
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        expected = expected_model(**batch, position_ids=positions, fused_lm_head=True)
        output = model(**batch, fused_lm_head=True)
        for field in ("loss", "aux_loss", "label_mask", *FIELDS):
            torch.testing.assert_close(output.get(field), expected.get(field), rtol=1e-4, atol=1e-5, msg=field)
        weights = torch.randn(output.log_probs.shape)
        for m, out in ((model, output), (expected_model, expected)):
            m.zero_grad()
            ((out.log_probs * weights).sum() + out.loss).backward()
        assert_same_gradients(gradients_of(model), gradients_of(expected_model))

    check()


@pytest.mark.parametrize("name", ["Llama", "Mistral with a window", "GPT-NeoX", "Qwen3 MoE"])
@pytest.mark.parametrize("mode", PACKINGS)
def test_reward_model_equals_trl_padded(name, mode):
    model, expected_model = (build(name, "ForSequenceClassification") for _ in range(2))
    moe = dict(output_router_logits=True) if "MoE" in name else {}
    pack_reward_model(model, *PACKINGS[mode])

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rows=batches)
    def check(rows):
        batch = collate(rows)
        del batch["labels"]
        recorded = {}
        hook = expected_model.base_model.register_forward_hook(lambda *call: recorded.update(outputs=call[-1]))
        expected = expected_model(**batch, use_cache=False, **moe)
        hook.remove()
        output = model(**batch, use_cache=False, **moe)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
        weights = torch.randn(output.logits.shape)
        losses = [(out.logits * weights).sum() for out in (output, expected)]
        if moe:
            aux_loss = load_balancing_loss_func(recorded["outputs"].router_logits, 4, 2, batch["attention_mask"])
            torch.testing.assert_close(output.aux_loss, aux_loss)
            losses = [losses[0] + output.aux_loss, losses[1] + aux_loss]
        for m, loss in zip((model, expected_model), losses, strict=True):
            m.zero_grad()
            loss.backward()
        assert_same_gradients(gradients_of(model), gradients_of(expected_model))

    check()


def test_the_reward_is_read_at_the_last_token_whatever_the_pad_token_and_the_heads_name():
    model = build("Llama", "ForSequenceClassification").eval()
    ids = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 0]])  # rows that end with the pad token
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    expected = [model.score(model.model(ids[i : i + 1, :n]).last_hidden_state)[0, -1] for i, n in ((0, 3), (1, 4))]
    model.value_head = model.score
    del model.score
    for mode in ("padded", "packed"):
        patched = copy.deepcopy(model)
        pack_reward_model(patched, *PACKINGS[mode])
        torch.testing.assert_close(patched(ids, mask).logits, torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_no_document_sees_another(share_prefix):
    """Another token in one pair leaves the log-probs of all other pairs the same, bit for bit."""
    model = build("Llama")
    pack_causal_lm(model, True, share_prefix)
    rows = [([1, 2, 3], [4, 5, 6, 7], [9, 8]), ([3, 1], [5, 2, 2], [7, 7, 4, 1]), ([6], [8, 8], [2, 9, 3])]
    changed = copy.deepcopy(rows)
    changed[1][1][1] = 30
    before, after = (model(**collate(x), fused_lm_head=True).log_probs for x in (rows, changed))
    others = torch.tensor([0, 2, 3, 4, 5])  # all but the second chosen side
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", ["Llama", "Mistral with a window"])
def test_a_packed_row_needs_no_mask(name, monkeypatch):
    """One of tokens x tokens would be built from the positions."""
    model = build(name)
    pack_causal_lm(model)
    batch = collate([([1, 2], [3], [4, 5])])
    model(**batch, fused_lm_head=True)  # the first call compares the heads, on an unpacked row
    monkeypatch.setattr(attention, "sdpa_mask", Mock(side_effect=AssertionError("a mask was built")))
    model(**batch, fused_lm_head=True)
    with pytest.raises(AssertionError, match="a mask was built"):
        model(**batch)


@pytest.mark.parametrize("kept", [True, False], ids=["kept logits", "computed again"])
def test_the_head_equals_autograd(kept, monkeypatch):
    monkeypatch.setattr(_LinearLogProbs, "CHUNK_LOGITS", 5 * VOCAB)
    monkeypatch.setattr(_LinearLogProbs, "KEPT_LOGITS", 2**28 if kept else 0)
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)
    targets, grad = torch.randint(VOCAB, (13,)), torch.randn(13)
    arguments = (targets, 2.0, 32, None, 0.5, FIELDS)  # temperature and logit_scale
    log_probs, entropy, sum_sq, mean, top1 = LogProbs.apply(hidden, weight, None, *arguments)
    gradients = torch.autograd.grad(log_probs, (hidden, weight), grad)
    logits = hidden.double() @ weight.double().T * 0.5 / 2.0
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(log_probs.double(), expected[range(13), targets], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum_sq.double(), (2 * expected).logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.double(), logits.mean(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(top1, logits.argmax(-1) == targets)
    expected_gradients = torch.autograd.grad(expected[range(13), targets], (hidden, weight), grad.double())
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_trls_head_is_exchanged_in_our_forward_only():
    model, batch = build("Llama"), collate([([1, 2], [3], [4, 5])])
    trls_forward = model.forward
    pack_causal_lm(model)
    model(**batch, fused_lm_head=True)  # the first call compares the heads
    with patch.object(LogProbs, "apply", wraps=LogProbs.apply) as head:
        model(**batch, fused_lm_head=True)
        trls_forward(**batch, fused_lm_head=True)
    assert head.call_count == 1


@pytest.mark.parametrize(
    ("task", "pack", "changes", "field"),
    [
        ("ForCausalLM", pack_causal_lm, {"fused_lm_head": True}, "log_probs"),
        ("ForSequenceClassification", pack_reward_model, {"labels": None}, "logits"),
    ],
)
def test_a_model_that_is_packed_twice_is_packed_as_the_second_call_says(task, pack, changes, field):
    results = []
    for calls in ([False], [True, False]):  # share_prefix
        model, batch = build("Llama", task), collate([([1, 2], [3], [3, 5])])
        for share_prefix in calls:
            pack(model, True, share_prefix)
        results.append(model(**batch | changes)[field])
    assert torch.equal(*results)


def test_a_batch_without_labels_has_a_loss_of_zero_and_gradients():
    model = build("Llama")
    pack_causal_lm(model)
    batch = collate([([1, 2], [3], [4, 5])])
    output = model(**batch | {"labels": torch.full_like(batch["labels"], -100)}, fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


# TRL's trainers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), initializer_range=0.2)
    return save_model(tmp_path_factory.mktemp("llama"), model, tokenizer)


def preferences():
    texts = [("what is " * (1 + i % 3), "five " * (1 + i % 5) + "plus", "five two " * (1 + i % 4)) for i in range(24)]
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts])


SETTINGS = {
    "full": {},
    "lora": {},
    "checkpointed": dict(gradient_checkpointing=True),
    "precomputed": dict(precompute_ref_log_probs=True),
    "weighted": dict(loss_type=["sigmoid", "ipo"], loss_weights=[1.0, 0.5], use_weighting=True),
    "packed by TRL": dict(packing=True),  # TRL's packing runs on transformers' block-diagonal mask
}


def train(kind, setting, mode, folder, output_dir):
    """One of TRL's trainers after four steps and an evaluation; `mode` None leaves its models as they are."""
    values = dict(max_steps=4, per_device_train_batch_size=3, logging_steps=1, eval_strategy="steps", eval_steps=4)
    values |= dict(learning_rate=1e-2, gradient_checkpointing=False, max_length=20, bf16=False, use_cpu=True, seed=7)
    values |= dict(report_to="none", save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2)
    args = getattr(trl, f"{kind}Config")(output_dir=str(output_dir), **values | SETTINGS[setting])
    lora = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear")
    lora.task_type = "SEQ_CLS" if kind == "Reward" else None
    rows = preferences()
    if kind == "SFT":
        rows = rows.remove_columns("rejected").rename_column("chosen", "completion")
    data = dict(train_dataset=rows, eval_dataset=rows.select(range(7)))
    trainer_class, peft_config = getattr(trl, f"{kind}Trainer"), lora if setting == "lora" else None
    trainer = trainer_class(str(folder), args=args, **data, peft_config=peft_config)
    models = [trainer.model, trainer.ref_model] if kind == "DPO" else [trainer.model]
    for model in filter(None, models) if mode is not None else ():
        (pack_reward_model if kind == "Reward" else pack_causal_lm)(model, *PACKINGS[mode])
    trainer.train()
    return trainer


def assert_same_logs(log, expected, rel, abs, but=()):
    """All but times, speeds and keys that contain one of `but`."""
    assert len(log) == len(expected) >= 5
    for row, other in zip(log, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if not any(part in name for part in ("runtime", "per_second", *but)):
                assert float(row[name]) == pytest.approx(float(value), rel=rel, abs=abs), name


@pytest.fixture(scope="module")
def log_of(folder, tmp_path_factory):
    """The log of a run of `train`, of which each is run once."""

    @functools.cache
    def run(kind, setting, mode):
        trainer = train(kind, setting, mode, folder, tmp_path_factory.mktemp("run"))
        log = [row for row in trainer.state.log_history if "train_runtime" not in row]
        if setting == "precomputed":  # before the first step the rewards are rounding errors
            del log[0]["rewards/accuracies"]
        return log

    return run


KINDS = {"DPO": ["full", "lora", "checkpointed", "precomputed", "weighted"], "Reward": ["full", "lora", "checkpointed"]}
CASES = [(kind, setting, mode) for kind in KINDS for setting in KINDS[kind] for mode in ("packed", "shared")]
CASES += [("SFT", "full", "padded"), ("SFT", "full", "packed")]
CASES += [("SFT", "packed by TRL", "packed"), ("SFT", "checkpointed", "packed")]


@pytest.mark.parametrize(("kind", "setting", "mode"), CASES)
def test_a_trainer_logs_what_trl_logs(kind, setting, mode, log_of):
    assert_same_logs(log_of(kind, setting, mode), log_of(kind, setting, None), rel=2e-3, abs=2e-4)


def test_training_leaves_generation_as_it_is(folder, tmp_path):
    trainer = train("SFT", "full", "packed", folder, tmp_path)
    trainer.model.eval().save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids, mask = torch.randint(3, 300, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    arguments = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(trainer.model.generate(ids, **arguments), loaded.generate(ids, **arguments))


# Refusals


def with_dropout():
    lora = LoraConfig(lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return get_peft_model(build("Llama"), lora)


def with_virtual_tokens():
    return get_peft_model(build("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def with_images():
    text = SIZES | GQA | dict(head_dim=4, model_type="gemma3_text")
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    parts = dict(text_config=text, vision_config=vision | dict(patch_size=14))
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**parts, mm_tokens_per_image=4))


@pytest.mark.parametrize(
    ("build_refused", "share_prefix", "message"),
    [
        (with_dropout, True, "share_prefix.*q_proj.*dropout of 0.1.*disable_dropout: true"),
        (with_virtual_tokens, False, "packing: PromptTuningConfig.*virtual tokens.*packing: false"),
        (with_images, False, "packing: Gemma3ForConditionalGeneration.*more than text"),
    ],
)
def test_a_model_that_packing_would_change_is_refused(build_refused, share_prefix, message):
    with pytest.raises(ValueError, match=message):
        pack_causal_lm(build_refused(), True, share_prefix)


# Lengths and batches


@settings(deadline=None)
@given(rows=batches, max_length=st.sampled_from([None, 1, 6]))
def test_pair_lengths_are_the_lengths_of_the_packed_rows(rows, max_length):
    columns = map(list, zip(*rows, strict=True))
    lengths, saved = pair_lengths(Dataset.from_dict(dict(zip(SIDES, columns, strict=True))), max_length)
    for row, length, saving in zip(rows, lengths, saved, strict=True):
        batch = collate([row], max_length=max_length)
        for share_prefix, expected in ((False, length), (True, length - saving)):
            packed, _ = pack_rows(batch["input_ids"], batch["attention_mask"], share_prefix)
            assert packed["input_ids"].shape[1] == expected


def long_tailed(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(5, 1, rows).astype(int) + 1


def batches_of(lengths, world_size, epoch=0, **arguments):
    """The batches of each step, one list for each rank."""
    samplers = [TokenBatchSampler(lengths, rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
    return list(zip(*samplers, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 300),
    world_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    limit=st.sampled_from([dict(rows_per_batch=1), dict(rows_per_batch=4), dict(max_tokens=20_000)]),
    drop_last=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_an_epoch_has_each_row_once(rows, world_size, accumulation, limit, drop_last, epoch):
    lengths = long_tailed(rows)
    arguments = dict(gradient_accumulation_steps=accumulation, drop_last=drop_last, seed=3, **limit)
    steps = batches_of(lengths, world_size, epoch, **arguments)
    for step in steps:
        assert len({len(batch) for batch in step}) == 1, "ranks have different numbers of rows"
        assert max(map(len, step)) <= limit.get("rows_per_batch", rows)
        assert all(lengths[batch].sum() <= limit.get("max_tokens", np.inf) for batch in step)
    count = np.bincount(sum(itertools.chain(*steps), []), minlength=rows)
    if drop_last:
        assert count.max(initial=0) <= 1 and (count == 0).sum() < limit.get("rows_per_batch", 1) * world_size
    else:
        assert count.min() >= 1 and count.sum() - rows < world_size


def test_epochs_differ_and_a_seed_repeats_them():
    epochs = [batches_of(long_tailed(100), 2, epoch, rows_per_batch=4) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert len(epochs[0]) == len(epochs[1])


@pytest.mark.parametrize(("world_size", "rows", "accumulation"), [(1, 8, 4), (4, 4, 2), (2, 16, 1)])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(world_size, rows, accumulation):
    def rows_of_steps(world_size, rows_per_batch, steps):
        arguments = dict(rows_per_batch=rows_per_batch, gradient_accumulation_steps=steps)
        batches = batches_of(long_tailed(32 * 20), world_size, **arguments)
        return [set(sum(itertools.chain(*batches[i : i + steps]), [])) for i in range(0, len(batches), steps)]

    assert rows_of_steps(world_size, rows, accumulation) == rows_of_steps(1, 32, 1)


def test_batches_are_more_even_than_random_ones():
    lengths = long_tailed(4096)
    steps = batches_of(lengths, 2, rows_per_batch=8, gradient_accumulation_steps=2)
    tokens = np.array([[lengths[batch].sum() for batch in step] for step in steps])
    random = lengths[np.random.default_rng(0).permutation(4096)].reshape(-1, 8).sum(1)
    assert tokens.std() < random.std() / 2
    assert np.abs(tokens[:, 0] - tokens[:, 1]).mean() < np.abs(random[::2] - random[1::2]).mean() / 2


def test_batches_of_max_tokens_are_nearly_full():
    lengths = long_tailed(2000)
    steps = batches_of(lengths, 2, max_tokens=8192)
    assert np.mean([lengths[batch].sum() for step in steps for batch in step]) > 0.85 * 8192


def test_a_row_longer_than_max_tokens_is_refused():
    with pytest.raises(ValueError, match="max_tokens_per_batch is 10.*12 packed tokens.*max_length"):
        TokenBatchSampler(np.array([3, 12]), max_tokens=10)


def test_transformers_and_accelerate_hand_the_batches_on_and_skip_them(folder, tmp_path):
    """Through Trainer.get_train_dataloader, and through what Trainer does on resume."""
    lengths = long_tailed(24)

    class Balanced(trl.DPOTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return TokenBatchSampler(lengths, rows_per_batch=5, seed=1)

    args = trl.DPOConfig(str(tmp_path), per_device_train_batch_size=5, bf16=False, use_cpu=True, report_to="none")
    trainer = Balanced(str(folder), args=args, train_dataset=preferences())
    loader = trainer.get_train_dataloader()
    sampler = TokenBatchSampler(lengths, rows_per_batch=5, seed=1)
    sampler.set_epoch(2)
    loader.set_epoch(2)
    expected = [trainer.train_dataset[rows]["chosen_ids"] for rows in sampler]
    assert len(loader) == len(expected) == 5
    seen = [batch["input_ids"].shape[0] // 2 for batch in loader]
    assert seen == [len(rows) for rows in expected]

    resumed = skip_first_batches(loader, 3)
    resumed.batch_sampler.batch_sampler.set_epoch(2)
    for batch, ids in zip(resumed, expected[3:], strict=True):
        masks = batch["completion_mask"].bool()
        assert [row[mask].tolist() for row, mask in zip(batch["input_ids"], masks, strict=True)][: len(ids)] == ids
