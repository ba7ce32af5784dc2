"""Pushing models: the real huggingface_hub against a Hub on loopback (tests/hub_server.py)."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hub_server import HubServer, reach_loopback
from huggingface_hub import HfApi
from safetensors.torch import save_file

from tunebook.errors import RecipeError
from tunebook.following import hub
from tunebook.following.hub import Uploads, check_hub_revision, differing_files, push_model, step_revision
from tunebook.following.staging import stage_model

REPO = "org/model"
JSON_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
MODEL = JSON_FILES | {"model.safetensors", "chat_template.jinja"}


@pytest.fixture(autouse=True)
def loopback(monkeypatch, tmp_path):
    reach_loopback(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def api(server):
    return HfApi(endpoint=server.url, token="hf_write")


@pytest.fixture
def uploads(api, tmp_path):
    uploads = Uploads(api, tmp_path / "run")
    yield uploads
    uploads.close()


@pytest.fixture
def model(tmp_path) -> Path:
    """A staged model."""
    stage_model(write_checkpoint(tmp_path / "a"), tmp_path / "model")
    return tmp_path / "model"


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A checkpoint folder as the Trainer leaves it, with a token in every file that must not leave the machine."""
    folder.mkdir(parents=True)
    save_file({"w": torch.full((64, 64), float(seed))}, folder / "model.safetensors")
    for name in MODEL - {"model.safetensors"}:
        (folder / name).write_text(f'{{"seed": {seed}}}')
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json", "recipe.yaml"):
        (folder / name).write_text("hf_secret")
    (folder / "global_step7").mkdir()
    (folder / "global_step7" / "zero_pp_rank_0.pt").write_text("hf_secret")
    return folder


def test_staged_model_survives_its_checkpoint_and_costs_no_space(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", seed=3)
    inode = (checkpoint / "model.safetensors").stat().st_ino
    stage_model(checkpoint, tmp_path / "staged" / "model")
    shutil.rmtree(checkpoint)
    staged = tmp_path / "staged" / "model"
    assert {path.name for path in staged.iterdir()} == MODEL
    assert (staged / "model.safetensors").stat().st_ino == inode
    assert (staged / "config.json").read_text() == '{"seed": 3}'


def test_checkpoint_without_weights_is_refused_with_what_to_set(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="FULL_STATE_DICT"):
        stage_model(checkpoint, tmp_path / "model")


def test_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", Mock(side_effect=OSError("Operation not permitted")))
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1")
    stage_model(checkpoint, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_push_makes_a_private_repo_and_a_branch_with_only_its_own_files(model, server, api):
    push_model(api, model, REPO, "v1", "first", None)
    api.upload_file(path_or_fileobj=b"notes", path_in_repo="other.md", repo_id=REPO)
    commit = push_model(api, model, REPO, step_revision("v1", 7), "seventh", None)
    repo = server.repos[REPO]
    assert repo.private
    assert repo.files("v1-step-000000007") == MODEL
    assert repo.branches["v1-step-000000007"] == commit
    assert repo.files("main") == {"other.md"}


@pytest.mark.parametrize("private", [True, False])
def test_hub_private_repo_is_honoured(model, server, api, private):
    push_model(api, model, REPO, "v1", "first", private)
    assert server.repos[REPO].private is private


def test_second_push_of_the_same_model_makes_no_commit_and_uploads_nothing(model, server, api):
    commits = [push_model(api, model, REPO, "v1", "first", None) for _ in range(2)]
    assert commits[0] == commits[1]
    assert sum(path.startswith("/lfs-objects/") for _, path in server.requests) == 1


def test_overwriting_removes_the_shards_of_the_earlier_model_and_keeps_what_is_not_ours(tmp_path, server, api):
    checkpoint = write_checkpoint(tmp_path / "a")
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    stage_model(checkpoint, tmp_path / "sharded")
    push_model(api, tmp_path / "sharded", REPO, "v1", "sharded", None)
    api.upload_file(path_or_fileobj=b"kept", path_in_repo="notes", repo_id=REPO, revision="v1")
    stage_model(write_checkpoint(tmp_path / "b"), tmp_path / "whole")
    push_model(api, tmp_path / "whole", REPO, "v1", "whole", None)
    assert server.repos[REPO].files("v1") == MODEL | {"notes"}


def test_differing_files_sees_missing_stale_and_changed_files(model, api):
    push_model(api, model, REPO, "v1", "first", None)
    assert differing_files(api, model, REPO, "v1") == []
    (model / "vocab.json").write_text("{}")  # not on the Hub
    (model / "tokenizer.json").unlink()  # only on the Hub
    (model / "config.json").write_text('{"seed": 9}')  # as long as before
    save_file({"w": torch.ones(64, 64)}, model / "model.safetensors")  # as long as before
    wrong = ["config.json", "model.safetensors", "tokenizer.json", "vocab.json"]
    assert differing_files(api, model, REPO, "v1") == wrong


def test_commit_that_lost_a_file_is_not_taken_for_a_push(model, server, api, monkeypatch):
    commit = server.commit
    monkeypatch.setattr(server, "commit", lambda repo, branch, parent, lines: commit(repo, branch, parent, lines[:-1]))
    with pytest.raises(RuntimeError, match="does not hold what was pushed to v1"):
        push_model(api, model, REPO, "v1", "first", None)


@pytest.mark.parametrize(
    "inject",
    [
        lambda server: server.fail("/api/repos/create", 503, times=2),
        lambda server: server.fail("/preupload/", 503, times=2),
        lambda server: server.fail("/commit/", 503, times=2),
        lambda server: server.drop("/lfs-objects/", times=2),
        lambda server: server.drop("/commit/", times=1),
        lambda server: server.fail("/tree/", 429, times=1),
    ],
    ids=["503-create", "503-preupload", "503-commit", "dropped-upload", "dropped-commit", "429-verify"],
)
def test_push_gets_through_a_hub_that_fails_for_a_while(tmp_path, server, uploads, inject):
    inject(server)
    uploads.submit(write_checkpoint(tmp_path / "a"), REPO, "v1", "first")
    uploads.wait(attempts=10)
    assert uploads.pushed == {"v1": server.repos[REPO].branches["v1"]}
    assert uploads.report() is None
    assert server.repos[REPO].files("v1") == MODEL
    assert list((tmp_path / "run" / "hub_pending").iterdir()) == []


def test_no_byte_that_could_hold_a_token_reaches_the_hub(tmp_path, server, uploads):
    uploads.submit(write_checkpoint(tmp_path / "a"), REPO, "v1", "first")
    uploads.wait()
    assert any(b"seed" in content for content in server.contents())
    assert not any(b"hf_secret" in content for content in server.contents())


def test_submit_does_not_wait_for_a_slow_hub(tmp_path, server, uploads):
    server.delay("/preupload/", 0.4)
    start = time.monotonic()
    for step in range(3):
        checkpoint = write_checkpoint(tmp_path / f"checkpoint-{step}", seed=step)
        uploads.submit(checkpoint, REPO, step_revision("v1", step), "step")
        shutil.rmtree(checkpoint)
    submitted = time.monotonic() - start
    uploads.wait()
    assert submitted < 0.4 < time.monotonic() - start
    assert [server.repos[REPO].files(step_revision("v1", step)) for step in range(3)] == [MODEL] * 3


@pytest.mark.parametrize("fault", [lambda hub: hub.delay("/preupload/", 60), lambda hub: hub.drip("/commits/")])
def test_hub_that_never_ends_its_answer_does_not_hold_the_run(tmp_path, server, monkeypatch, request, fault):
    fault(server)
    monkeypatch.setattr(hub, "SILENCE", 0.2)
    uploads = request.getfixturevalue("uploads")
    uploads.submit(write_checkpoint(tmp_path / "a"), REPO, "v1", "first")
    uploads.wait(attempts=1)
    assert "v1: " in uploads.report() and "tunebook push" in uploads.report()


def test_hub_that_is_down_leaves_everything_staged_and_says_how_to_push_it(tmp_path, server, api):
    uploads = Uploads(HfApi(endpoint="http://127.0.0.1:9", token="hf_write"), tmp_path / "run")
    for step in range(6):
        uploads.submit(write_checkpoint(tmp_path / f"a{step}", seed=step), REPO, step_revision("v1", step), "step")
    report = uploads.finish()
    assert all(f"\n  v1-step-{step:09d}: " in report for step in range(6))
    assert f"tunebook push {tmp_path / 'run'}" in report
    assert Uploads(api, tmp_path / "run").finish() is None
    weights = tmp_path / "a2" / "model.safetensors"
    blob = server.repos[REPO].resolve("v1-step-000000002").tree["model.safetensors"]
    assert server.lfs[blob.sha256] == weights.read_bytes()


def test_refused_push_is_not_tried_again_and_does_not_stop_the_others(tmp_path, server, uploads):
    server.fail("/commit/bad", 403)
    uploads.submit(write_checkpoint(tmp_path / "a"), REPO, "bad", "refused")
    uploads.submit(write_checkpoint(tmp_path / "b"), REPO, "good", "accepted")
    uploads.wait()
    assert uploads.refused == {"bad"} and set(uploads.pushed) == {"good"}
    assert sum("/commit/bad" in path for _, path in server.requests) == 1
    assert "403" in uploads.report()


@pytest.mark.parametrize(("status", "times"), [(503, 8), (403, 1)])
def test_model_staged_later_for_a_revision_wins_over_an_earlier_one_that_failed(
    tmp_path, server, uploads, status, times
):
    server.fail("/commit/v1", status, times)
    uploads.submit(write_checkpoint(tmp_path / "old", seed=1), REPO, "v1", "old")
    uploads.wait(attempts=1)
    new = write_checkpoint(tmp_path / "new", seed=2)
    uploads.submit(new, REPO, "v1", "new")
    uploads.wait(attempts=10)
    blob = server.repos[REPO].resolve("v1").tree["model.safetensors"]
    assert server.lfs[blob.sha256] == (new / "model.safetensors").read_bytes()
    assert list((tmp_path / "run" / "hub_pending").iterdir()) == []


def test_what_a_staging_that_was_cut_off_left_is_deleted(tmp_path, server, api):
    write_checkpoint(tmp_path / "run" / "hub_pending" / ".1-v1-x" / "1-v1" / "model")
    assert Uploads(api, tmp_path / "run").finish() is None
    assert server.repos == {} and not list((tmp_path / "run" / "hub_pending").iterdir())


BROKEN = {
    "no push.json": lambda entry: (entry / "push.json").unlink(),
    "empty": lambda entry: (entry / "push.json").write_bytes(b""),
    "other keys": lambda entry: (entry / "push.json").write_text('{"what": 1}'),
    "list": lambda entry: (entry / "push.json").write_text("[]"),
    "bytes": lambda entry: (entry / "push.json").write_bytes(b"\xff\x00\xfe"),
    "no weights": lambda entry: (entry / "model" / "model.safetensors").unlink(),
    "no config": lambda entry: (entry / "model" / "config.json").unlink(),
    "no model": lambda entry: shutil.rmtree(entry / "model"),
    "other weights": lambda entry: save_file({"w": torch.ones(64, 64)}, entry / "model" / "model.safetensors"),
    "a file": lambda entry: (shutil.rmtree(entry), entry.write_text("")),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_a_staged_model_that_is_broken_is_named_not_pushed_and_does_not_hold_up_the_others(
    tmp_path, server, api, damage
):
    down = Uploads(HfApi(endpoint="http://127.0.0.1:9", token="hf_write"), tmp_path / "run")
    for name in ("broken", "whole"):
        down.submit(write_checkpoint(tmp_path / name), REPO, name, "step")
    down.finish()
    [entry] = (tmp_path / "run" / "hub_pending").glob("*-broken")
    damage(entry)
    report = Uploads(api, tmp_path / "run").finish()
    assert f"{entry} is not pushed: " in report and "Remove" in report and "whole" not in report
    assert server.repos[REPO].files("whole") == MODEL
    assert "broken" not in server.repos[REPO].branches

    again = Uploads(api, tmp_path / "run")
    again.submit(tmp_path / "broken", REPO, "broken", "step")
    assert again.finish() is None and server.repos[REPO].files("broken") == MODEL


def test_what_was_pushed_is_known_to_the_next_process_until_the_model_is_another(tmp_path, server, uploads, api):
    uploads.submit(write_checkpoint(tmp_path / "a"), REPO, "v1", "first")
    uploads.wait()
    later = Uploads(api, tmp_path / "run")
    assert later.holds(tmp_path / "a", REPO, "v1")
    assert not later.holds(tmp_path / "a", REPO, "v2") and not later.holds(tmp_path / "a", "org/other", "v1")
    assert not later.holds(write_checkpoint(tmp_path / "b", seed=1), REPO, "v1")
    later.close()


def test_xet_is_used_where_the_hub_offers_it(model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with HubServer(xet_cas_url="memory://") as server:
        push_model(HfApi(endpoint=server.url, token="hf_write"), model, REPO, "v1", "first", None)
    assert any("/xet-write-token/" in path for _, path in server.requests)
    assert server.lfs == {} and server.repos[REPO].files("v1") == MODEL


def check(api: HfApi, revision: str = "v1", **changes) -> None:
    keys = {"hub_model_id": REPO, "hub_revision": revision, "hub_private_repo": None, "hub_push_to_main": False}
    keys |= {"overwrite_hub_revision": False, "hub_push_failure": "warn"}
    check_hub_revision(api, SimpleNamespace(**keys | changes))


class TestCheck:
    def test_free_revisions_pass(self, api, model):
        check(api)  # no repository yet
        push_model(api, model, REPO, "v1", "first", None)
        api.create_branch(REPO, branch="empty")
        check(api, "v2", hub_push_to_main=True)
        check(api, "empty")

    @pytest.mark.parametrize("taken", ["v1", step_revision("v1", 5), "main"])
    def test_revision_that_holds_a_model_is_refused_by_name_unless_overwritten(self, api, model, taken):
        push_model(api, model, REPO, taken, "first", None)
        with pytest.raises(ValueError, match=f"Revision {taken} of org/model already holds a model"):
            check(api, hub_push_to_main=True)
        check(api, hub_push_to_main=True, overwrite_hub_revision=True)

    @pytest.mark.parametrize(
        ("token", "message"), [(None, "no Hub token"), ("hf_read", "may only read"), ("hf_mistyped", "refused")]
    )
    def test_token_that_is_missing_unknown_or_may_only_read_is_refused(self, server, token, message):
        with pytest.raises(ValueError, match=message):
            check(HfApi(endpoint=server.url, token=token))

    def test_public_repo_is_refused_when_private_was_asked_for(self, server, api):
        api.create_repo(REPO, private=False)
        with pytest.raises(ValueError, match="public"):
            check(api, hub_private_repo=True)
        check(api)

    def test_hub_that_is_down_is_a_warning_or_an_error_as_asked(self, caplog):
        api = HfApi(endpoint="http://127.0.0.1:9", token="hf_write")
        check(api)
        assert "cannot be reached" in caplog.text
        with pytest.raises(ConnectionError):
            check(api, hub_push_failure="raise")
