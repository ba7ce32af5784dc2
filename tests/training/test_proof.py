"""The proof at the start of a run, and what else a run asks of its model."""

import copy

import pytest
import torch
from conftest import build_model, logged, save_model, train
from transformers import CTRLConfig, GPT2Config, GraniteMoeHybridConfig, LlamaConfig, MistralConfig, OPTConfig
from trl.trainer.utils import add_fused_lm_head

from tunebook.errors import RecipeError
from tunebook.packing import forward, pack_causal_lm
from tunebook.packing.attention import set_varlen_attention
from tunebook.packing.dropout import turn_off_dropout
from tunebook.training import proof
from tunebook.training.proof import Proof, sliding_window

TASKS = ["sft", "rm", "dpo"]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_a_run_says_how_far_it_is_from_the_models_own_forward(task, packing, tiny, task_rows, tmp_path, caplog):
    train(task, tiny, task_rows, tmp_path / "o", packing=packing, max_length=64, max_steps=1)
    (line,) = [record.message for record in caplog.records if record.message.startswith("verify_model")]
    assert float(line.split("differs by ")[1].split()[0]) < 1e-4


@pytest.mark.parametrize("task", TASKS)
def test_a_forward_that_is_wrong_is_refused_with_the_number(task, tokenizer, task_rows, tmp_path, monkeypatch):
    def misplace(*args):
        packed, source = pack_rows(*args)
        return packed | {"position_ids": 3 * packed["position_ids"]}, source

    pack_rows = forward.pack_rows
    monkeypatch.setattr(forward, "pack_rows", misplace)
    model = save_model(tmp_path / "m", build_model(len(tokenizer), initializer_range=0.3), tokenizer)
    keys = dict(packing=True, max_length=64, max_steps=1)
    with pytest.raises(RecipeError, match=r"differs by \d.*0.001 is allowed.*packing: false"):
        train(task, model, task_rows, tmp_path / "o", **keys)
    train(task, model, task_rows, tmp_path / "o", **keys, verify_model=False)


def test_a_model_that_sees_the_future_is_refused(tokenizer, sft_rows, tmp_path):
    model = save_model(tmp_path / "m", build_model(len(tokenizer), is_causal=False), tokenizer)
    with pytest.raises(RecipeError, match="changes by .* with the token that follows.*is_causal"):
        train("sft", model, sft_rows, tmp_path / "o")
    with pytest.raises(RecipeError, match="does not attend causally.*packing: false"):
        train("sft", model, sft_rows, tmp_path / "o", packing=True, max_length=64)


def test_the_random_state_is_as_without_the_proof(tokenizer, sft_rows, tmp_path):
    model = build_model(len(tokenizer), GPT2Config, n_embd=32, n_layer=2, n_head=4)
    model = save_model(tmp_path / "m", model, tokenizer)
    losses = [
        logged(train("sft", model, sft_rows, tmp_path / str(verify), verify_model=verify), "loss")
        for verify in (True, False)
    ]
    assert losses[0] == losses[1]


def test_a_window_is_proven_up_to_1024_tokens_and_named_beyond(tokenizer, sft_rows, tmp_path, caplog):
    lengths, measure = [], proof.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "measure", lambda *args: lengths.append(len(args[2])) or measure(*args))
        for window in (20, 2000):
            model = build_model(len(tokenizer), MistralConfig, sliding_window=window, max_position_embeddings=4096)
            model = save_model(tmp_path / str(window), model, tokenizer)
            train("sft", model, sft_rows, tmp_path / f"o{window}", packing=True, max_length=3000, max_steps=1)
    assert lengths == [36, 24]
    assert "longer than the window of 2000 tokens are not proven" in caplog.text


def test_a_window_is_found_by_any_name():
    names = ("sliding_window", "window_size", "sliding_window_size", "attention_window_size", "attention_chunk_size")
    assert [sliding_window({name: 7, "max_position_embeddings": 99}) for name in names] == [7] * 5
    assert sliding_window({"sliding_window": None, "use_sliding_window": True}) is None


@pytest.mark.parametrize(
    ("half", "trained", "padded", "refused"),
    [
        (False, 9e-4, 0.0, False),
        (False, 2e-3, 1.0, True),
        (False, float("nan"), 0.0, True),
        (True, 0.04, 0.0, False),
        (True, 0.06, 0.0, True),
        (True, 0.4, 0.1, False),
        (True, 0.6, 0.1, True),
    ],
)
def test_what_is_allowed(half, trained, padded, refused):
    measured = Proof("LlamaForCausalLM", False, True, half, trained, padded, future=0.0)
    if refused:
        with pytest.raises(ValueError, match="LlamaForCausalLM differs by"):
            measured.judge()
    else:
        measured.judge()


# What else a run asks of its model


def test_positions_beyond_a_learned_table_are_refused(tokenizer, pair_rows, sft_rows, tmp_path):
    model = build_model(len(tokenizer), GPT2Config, max_position_embeddings=12, n_embd=32, n_layer=1)
    model = save_model(tmp_path / "m", model, tokenizer)
    for task, rows in (("sft", sft_rows), ("dpo", pair_rows)):
        with pytest.raises(RecipeError, match="learned 12 positions, and the longest row has .*max_length: 12"):
            train(task, model, rows, tmp_path / "o")
    train("sft", model, sft_rows, tmp_path / "o", max_length=12, max_steps=1)


def test_checkpointing_that_a_model_lacks_is_off_by_default_and_refused_on_request(
    tokenizer, sft_rows, tmp_path, caplog
):
    model = build_model(len(tokenizer), CTRLConfig, n_embd=32, dff=32, n_layer=1, n_head=4)
    model = save_model(tmp_path / "m", model, tokenizer)
    train("sft", model, sft_rows, tmp_path / "o", max_steps=1)
    assert "Activation checkpointing is off: CTRLLMHeadModel has none." in caplog.text
    with pytest.raises(RecipeError, match="`activation_checkpointing`: CTRLLMHeadModel has none"):
        train("sft", model, sft_rows, tmp_path / "o", activation_checkpointing=True)


def test_dense_granite_4_trains_packed_and_has_no_balancing_loss(tokenizer, sft_rows, tmp_path, caplog):
    config = dict(layer_types=["attention", "attention"], num_local_experts=0, shared_intermediate_size=32)
    config |= dict(mamba_n_heads=4, mamba_d_head=16, router_aux_loss_coef=0.01)
    model = build_model(len(tokenizer), GraniteMoeHybridConfig, **config)
    model = save_model(tmp_path / "m", model, tokenizer)
    trainer = train("sft", model, sft_rows, tmp_path / "o", packing=True, max_length=64, max_steps=1)
    assert "No load-balancing loss" in caplog.text and not logged(trainer, "aux_loss")


def test_dropout_that_is_no_module_is_turned_off():
    model = build_model(64, OPTConfig, ffn_dim=32, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5).train()
    ids = torch.arange(8)[None]
    assert not model(ids).logits.equal(model(ids).logits)
    turn_off_dropout(model)
    assert model(ids).logits.equal(model(ids).logits)


def test_attention_dropout_by_another_name_is_refused_packed():
    model = build_model(64, OPTConfig, ffn_dim=32, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.5)
    with pytest.raises(ValueError, match="attention_dropout of 0.5"):
        set_varlen_attention(model)


@pytest.mark.parametrize("scored", ["a layer", "a cap", "a trained scale"])
def test_what_a_head_of_unknown_code_does_is_done(scored):
    class Head(torch.nn.Linear):
        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features, bias=False)
            self.weight = linear.weight
            self.before = torch.nn.Linear(self.in_features, self.in_features) if scored == "a layer" else None
            self.scale = torch.nn.Parameter(torch.ones(())) if scored == "a trained scale" else None

        def forward(self, hidden):
            logits = super().forward(hidden if self.before is None else self.before(hidden))
            return logits if self.scale is None else logits * self.scale

    model = build_model(64, LlamaConfig)
    model.lm_head = Head(model.lm_head)
    if scored == "a cap":
        model.lm_head.register_forward_hook(lambda module, args, logits: 5 * torch.tanh(logits / 5))
    ids = torch.arange(1, 13)[None]
    expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    expected.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    patched = copy.deepcopy(model)
    add_fused_lm_head(patched)
    pack_causal_lm(patched)
    output = patched(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    output.log_probs.sum().backward()
    torch.testing.assert_close(output.log_probs[0], expected, rtol=1e-4, atol=1e-5)
    for name, parameter in patched.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
