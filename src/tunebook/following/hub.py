"""Model folders on the Hub: staged on disk, pushed in a thread, verified.

What is staged is the queue: a push that fails, or that its process did not live to make, stays in `hub_pending/` of
the run's folder until it succeeds, in the next run there or by `tunebook push RUN_DIR`.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects, get_session
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..files import whole_folder

logger = logging.getLogger(__name__)

# A list of what may leave the machine, since what may not (optimizer states, training_args.bin, which holds hub_token,
# the recipe, whatever a callback writes into a checkpoint) has no end.
MODEL_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "README.md"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("*.jinja", "additional_chat_templates/*.jinja", "configuration_*.py", "modeling_*.py", "tokenization_*.py"),
)
PENDING = "hub_pending"
MAX_DELAY = 60  # seconds between two attempts
SILENCE = 300  # seconds without a byte, after which a request has failed


def step_revision(revision: str, step: int) -> str:
    """The branch of a checkpoint; zero-padded, so that branches sort by step."""
    return f"{revision}-step-{step:09d}"


def check_hub_revision(
    api: HfApi,
    repo_id: str,
    revision: str,
    *,
    push_to_main: bool = False,
    private: bool | None = None,
    overwrite: bool = False,
    must_reach: bool = False,
) -> None:
    """Refuse, before anything is loaded, pushes that the Hub would refuse or that would overwrite a model.

    A revision is taken when it, or one of its step revisions, holds a model; an empty branch is free. When the Hub
    cannot be reached, that is an error if `must_reach`, else a warning, as the checkpoints will wait on disk.

    Raises:
        ValueError: there is no token, it may not write, the revision is taken and `overwrite` is false, or the
            repository is public while `private` is true.
        ConnectionError: the Hub cannot be reached and `must_reach` is true.
    """
    try:
        role = api.whoami()["auth"].get("accessToken", {}).get("role")
        if role == "read":
            raise ValueError(f"The Hub token may only read: nothing can be pushed to {repo_id}; use another")
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} is public, hub_private_repo is true; make it private or change hub_model_id")
        if overwrite:
            return
        branches = [branch.name for branch in api.list_repo_refs(repo_id).branches]
        for name in sorted(branches):
            ours = name == revision or name.startswith(f"{revision}-step-") or (push_to_main and name == "main")
            if ours and {"config.json", "adapter_config.json"} & set(api.list_repo_files(repo_id, revision=name)):
                raise ValueError(
                    f"Revision {name} of {repo_id} already holds a model; choose another hub_revision, or set "
                    "overwrite_hub_revision: true"
                )
    except RepositoryNotFoundError:
        return
    except LocalTokenNotFoundError as error:
        raise ValueError("There is no Hub token to push with; run `hf auth login` or set HF_TOKEN") from error
    except (httpx2.HTTPError, OSError) as error:
        if is_refusal(error):
            raise ValueError(f"The Hub refused to tell about {repo_id}: {error}") from error
        if must_reach:
            raise ConnectionError(f"The Hub cannot be reached: {error}") from error
        logger.warning(
            "The Hub cannot be reached (%s): it was not checked that %s of %s is free. Checkpoints will wait on disk.",
            *(error, revision, repo_id),
        )


def is_refusal(error: Exception) -> bool:
    """Whether the Hub gave an answer that asking again will not change: no conflict, rate limit or time-out."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return 400 <= status < 500 and status not in (408, 409, 412, 429)
    return isinstance(error, LocalTokenNotFoundError)


def stage_model(source: Path, target: Path) -> None:
    """Put the model files of a checkpoint into a new folder that no rotation of checkpoints can touch.

    Weights are hard links, which cost no space and survive the deletion of the checkpoint, or copies where the file
    system has no links. `target` appears complete or not at all.

    Raises:
        FileNotFoundError: there are no weights in `source`.
    """
    if not any(source.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{source} holds no *.safetensors; to push or benchmark checkpoints under FSDP, set "
            "fsdp_state_dict_type: FULL_STATE_DICT, and under ZeRO-3 zero3_save_16bit_model: true"
        )
    with whole_folder(target) as folder:
        for path in {path for pattern in MODEL_FILES for path in source.glob(pattern)}:
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".safetensors":
                shutil.copyfile(path, copy)
                continue
            try:
                os.link(path, copy)
            except OSError:
                shutil.copyfile(path, copy)


def push_model(api: HfApi, folder: Path, repo_id: str, revision: str, message: str, private: bool | None) -> str:
    """Push a staged folder to a revision, made if there is none, check what the Hub then holds, and return the commit.

    A new repository is private unless `private` is false. Model files that the revision holds and the folder does not
    are deleted; whatever else it holds is kept. Pushing what is there already makes no commit.

    Raises:
        RuntimeError: the commit does not hold the folder's files, byte for byte.
        OSError, httpx2.HTTPError: from the Hub, or on the way to it.
    """
    api.create_repo(repo_id, private=private is not False, exist_ok=True)
    # From the first commit, so that a step revision holds its own files and not what main holds today.
    first_commit = api.list_repo_commits(repo_id)[-1].commit_id
    api.create_branch(repo_id, branch=revision, revision=first_commit, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=message,
        delete_patterns=list(MODEL_FILES),
    ).oid
    if wrong := differing_files(api, folder, repo_id, commit):
        raise RuntimeError(f"The Hub does not hold what was pushed to {revision} of {repo_id}: {', '.join(wrong)}")
    return commit


def differing_files(api: HfApi, folder: Path, repo_id: str, revision: str) -> list[str]:
    """Model files that only one side has, or whose size or content hash on the Hub is not that in the folder."""
    tree = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    remote = {file.path: file for file in tree if isinstance(file, RepoFile)}
    local = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    stale = set(filter_repo_objects(remote, allow_patterns=list(MODEL_FILES))) - local.keys()
    wrong = [name for name, path in local.items() if name not in remote or not is_same_file(path, remote[name])]
    return sorted({*wrong, *stale})


def is_same_file(path: Path, file: RepoFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.lfs is None:
        return git_hash(path.read_bytes()) == file.blob_id
    with path.open("rb") as stream:
        return sha_fileobj(stream).hex() == file.lfs.sha256


@dataclass(frozen=True)
class Push:
    """What is written beside a staged model: all that is needed to push it later."""

    repo_id: str
    revision: str
    message: str
    private: bool | None


class Uploads:
    """Pushes staged models in one daemon thread: training never waits, and nothing that is staged is lost.

    A push that fails is tried again, the others first, after 1, 2, 4 ... 60 s, for as long as the process lives. One
    that the Hub refuses is not. One worker, because hf_xet has one session a process, which a failing push aborts.

    Attributes:
        pushed: commit by revision, of what this process pushed and verified.
        failed: last error by revision, of what was tried and is not on the Hub.
        refused: the revisions in `failed` that this process will not try again.
    """

    def __init__(self, api: HfApi, output_dir: Path):
        self.api = api
        self.folder = Path(output_dir) / PENDING
        self.pushed: dict[str, str] = {}
        self.failed: dict[str, Exception] = {}
        self.refused: set[str] = set()
        self._changed = threading.Condition()
        self._failures = 0  # in a row
        self._closed = False
        # huggingface_hub 2.4 waits for ever for a server that accepts a connection and does not answer
        get_session().timeout = SILENCE
        # Names begin with the time of staging. Where push.json is missing, staging was cut off.
        staged = sorted(path.parent for path in self.folder.glob("*/push.json"))
        self._queue = deque((folder, Push(**json.loads((folder / "push.json").read_text()))) for folder in staged)
        threading.Thread(target=self._work, name="hub-push", daemon=True).start()

    def submit(self, source: Path, repo_id: str, revision: str, message: str, private: bool | None = None) -> None:
        """Stage a model and queue its push; returns as soon as it is staged."""
        folder = self.folder / f"{time.time_ns()}-{revision.replace('/', '-')}"
        push = Push(repo_id, revision, message, private)
        stage_model(source, folder / "model")
        (folder / "push.json").write_text(json.dumps(asdict(push)))
        with self._changed:
            self.pushed.pop(revision, None)
            self._queue.append((folder, push))
            self._changed.notify_all()

    def wait(self, attempts: int = 4) -> None:
        """Block until everything is pushed or refused, or `attempts` in a row have failed."""
        with self._changed:
            self._failures = 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._queue or self._failures >= attempts)

    def close(self) -> None:
        """End the thread, after the push that it is making; what is not pushed stays staged."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def report(self) -> str | None:
        """What is not on the Hub, why, and how to push it; None when everything is."""
        with self._changed:
            revisions = sorted(self.refused | {push.revision for _, push in self._queue})
        if not revisions:
            return None
        reasons = "".join(f"\n  {revision}: {self.failed.get(revision, 'not tried yet')}" for revision in revisions)
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return (
            f"{len(revisions)} revision(s) were not pushed to the Hub:{reasons}\nTheir models ({size / 1e9:.3f} GB) "
            f"are kept in {self.folder}. Push them with: tunebook push {self.folder.parent}"
        )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                folder, push = self._queue[0]
                newer = any(other.revision == push.revision and later > folder for later, other in self._queue)
            commit = error = None
            if not newer:
                try:
                    commit = push_model(self.api, folder / "model", **asdict(push))
                except Exception as caught:  # A thread has nobody to raise to: the callback reads `failed`.
                    error = caught
            with self._changed:
                self._queue.popleft()
                self._settle(folder, push, commit, error)
                self._changed.notify_all()
                if self._failures:
                    self._changed.wait(min(2 ** (self._failures - 1), MAX_DELAY))

    def _settle(self, folder: Path, push: Push, commit: str | None, error: Exception | None) -> None:
        if error is None:
            self._failures = 0
            self.failed.pop(push.revision, None)
            self.refused.discard(push.revision)
            if commit:
                self.pushed[push.revision] = commit
                logger.info("Pushed %s to %s (%s)", push.revision, push.repo_id, commit)
            shutil.rmtree(folder, ignore_errors=True)  # what is left behind would be pushed again, to no effect
            return
        if str(error) != str(self.failed.get(push.revision)):
            logger.warning("%s was not pushed to %s: %s", push.revision, push.repo_id, error)
        self.failed[push.revision] = error
        if is_refusal(error):
            self.refused.add(push.revision)
        else:
            self._failures += 1
            self._queue.append((folder, push))


def push_staged(api: HfApi, output_dir: Path) -> str | None:
    """Push what a run left in its folder; return what is still not on the Hub, as `Uploads.report`."""
    uploads = Uploads(api, output_dir)
    uploads.wait()
    uploads.close()
    return uploads.report()
