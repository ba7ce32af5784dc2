"""Model folders on the Hub: staged on disk, pushed in a thread, verified.

The staged folders are the queue. A push that failed, or that its process did not live to make, stays in `hub_pending/`
of the run's folder until it succeeds, in the next run there or by `tunebook push RUN_DIR`. `hub_pushed.jsonl` lists
what the Hub holds.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2
from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects, get_session
from pydantic import TypeAdapter, ValidationError
from transformers import TrainerControl, TrainerState

from ..checkpoints import DamagedError, checksum, optional, step_of
from ..errors import RecipeError
from ..files import append_rows, delete_folder, read_rows, whole_folder
from ..recipe.configs import RunConfig
from .staging import MODEL_FILES, StagingCallback, model_checksums, stage_model

logger = logging.getLogger(__name__)

PENDING = "hub_pending"
PUSHED = "hub_pushed.jsonl"
MAX_DELAY = 60  # seconds between two attempts
REMINDER = 60  # seconds between two lines about what a run waits for
SILENCE = 300  # seconds without a byte, after which a request has failed


def step_revision(revision: str, step: int) -> str:
    """Return the branch of a checkpoint; zero-padded, so that branches sort by step."""
    return f"{revision}-step-{step:09d}"


def final_revisions(args: RunConfig) -> set[str]:
    """Return the branches that the final model is pushed to."""
    return {args.hub_revision, "main"} if args.hub_push_to_main else {args.hub_revision}


def check_hub_revision(api: HfApi, args: RunConfig) -> None:
    """Refuse, before anything is loaded, pushes that the Hub would refuse or that would overwrite a model.

    A revision is taken when it, or one of its step revisions, holds a model; an empty branch is free. A Hub that cannot
    be reached is an error with `hub_push_failure: raise`, else a warning, as the checkpoints will wait on disk.

    Raises:
        ValueError: there is no token, it may not write, the revision is taken and not to be overwritten, or the
            repository is public while `hub_private_repo` is true.
        ConnectionError: the Hub cannot be reached and `hub_push_failure` is "raise".
    """
    repo_id, revision = args.hub_model_id, args.hub_revision
    try:
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise RecipeError(f"The Hub token may only read, so nothing can be pushed to {repo_id}. Use a write token.")
        if args.hub_private_repo and not api.repo_info(repo_id).private:
            raise RecipeError(
                f"{repo_id} is public, but `hub_private_repo` is true. Make it private, or change `hub_model_id`."
            )
        branches = [] if args.overwrite_hub_revision else api.list_repo_refs(repo_id).branches
        for name in sorted(branch.name for branch in branches):
            is_ours = name in final_revisions(args) or name.startswith(f"{revision}-step-")
            if is_ours and {"config.json", "adapter_config.json"} & set(api.list_repo_files(repo_id, revision=name)):
                raise RecipeError(
                    f"Revision {name} of {repo_id} already holds a model. Choose another `hub_revision`, or set "
                    "`overwrite_hub_revision: true`."
                )
    except RecipeError:
        raise
    except RepositoryNotFoundError:
        return
    except LocalTokenNotFoundError as error:
        raise ValueError("There is no Hub token to push with. Run `hf auth login`, or set HF_TOKEN.") from error
    except (httpx2.HTTPError, OSError, LookupError, TypeError, AttributeError, ValueError) as error:  # odd answers, too
        if is_refusal(error):
            raise ValueError(f"The Hub refused a request about {repo_id}: {error}") from error
        if args.hub_push_failure == "raise":
            raise ConnectionError(f"The Hub cannot be reached: {error!r}") from error
        text = "The Hub cannot be reached (%r), so whether %s of %s is free is unknown. Checkpoints will wait on disk."
        logger.warning(text, error, revision, repo_id)


def is_refusal(error: Exception) -> bool:
    """Return whether the Hub gave an answer that asking again will not change: no conflict, rate limit or time-out."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return 400 <= status < 500 and status not in (408, 409, 412, 429)
    return isinstance(error, LocalTokenNotFoundError)


def push_model(api: HfApi, folder: Path, repo_id: str, revision: str, message: str, private: bool | None) -> str:
    """Push a staged folder to a revision, created if missing, check what the Hub then holds, and return the commit.

    A new repository is private unless `private` is false. Model files that the revision holds and the folder does not
    are deleted; all its other files are kept. Pushing what is there already makes no commit.

    Raises:
        RuntimeError: the commit does not hold the folder's files, byte for byte.
        OSError, httpx2.HTTPError: from the Hub, or on the way to it.
    """
    api.create_repo(repo_id, private=private is not False, exist_ok=True)
    # From the first commit, so that a step revision holds its own files and not what main holds today
    first_commit = api.list_repo_commits(repo_id)[-1].commit_id
    api.create_branch(repo_id, branch=revision, revision=first_commit, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message, delete_patterns=MODEL_FILES
    ).oid
    if wrong := differing_files(api, folder, repo_id, commit):
        raise RuntimeError(f"The Hub does not hold what was pushed to {revision} of {repo_id}: {', '.join(wrong)}.")
    return commit


def differing_files(api: HfApi, folder: Path, repo_id: str, revision: str) -> list[str]:
    """Return the model files that only one side has, or whose content hash on the Hub differs from the folder's."""
    found = api.verify_repo_checksums(repo_id, revision=revision, local_dir=folder)
    stale = filter_repo_objects(found.missing_paths, allow_patterns=MODEL_FILES)
    return sorted([*found.extra_paths, *stale, *(file["path"] for file in found.mismatches)])


class LimitedAnswer(httpx2.SyncByteStream):
    """The body of an answer, which has failed when it is not whole after `SILENCE`."""

    def __init__(self, stream: httpx2.SyncByteStream):
        self.stream, self.end = stream, time.monotonic() + SILENCE

    def __iter__(self) -> Iterator[bytes]:
        for part in self.stream:
            if time.monotonic() > self.end:
                raise httpx2.ReadTimeout(f"The answer was not whole after {SILENCE} s.")
            yield part

    def close(self) -> None:
        self.stream.close()


def limit_answer(response: httpx2.Response) -> None:
    """Limit the time of an answer of the Hub's API; files may take as long as they need."""
    if "/api/" in response.url.path and isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = LimitedAnswer(response.stream)


@dataclass(frozen=True)
class Push:
    """A staged model and where it goes, kept next to it in `push.json`."""

    repo_id: str
    revision: str
    message: str
    private: bool | None
    files: dict[str, str]  # name -> checksum

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what the Hub is to hold, and where."""
        return self.repo_id, self.revision, json.dumps(self.files, sort_keys=True)

    def check(self, folder: Path) -> None:
        """Raise a DamagedError where a staged folder does not hold the model that was staged."""
        for name, expected in self.files.items():
            if not (folder / name).is_file():
                raise DamagedError(f"{folder / name} is missing.")
            if checksum(folder / name) != expected:
                raise DamagedError(f"{folder / name} has changed since it was staged.")


PUSH = TypeAdapter(Push)


def slug(revision: str) -> str:
    """Return a revision as it stands, behind the time of staging, in the name of a staged folder."""
    return revision.replace("/", "-")


def read_staged(pending: Path) -> tuple[list[tuple[Path, Push]], dict[str, str]]:
    """Return the staged models and their pushes, oldest first; and by name the folders that cannot be read, and why."""
    staged, broken = [], {}
    for folder in sorted(pending.glob("[!.]*")):
        try:
            staged.append((folder, PUSH.validate_json((folder / "push.json").read_bytes())))
        except OSError:
            broken[folder.name] = "push.json is missing"
        except ValidationError:
            broken[folder.name] = "push.json cannot be read"
    return staged, broken


class Uploads:
    """Pushes staged models in one daemon thread: training never waits, and nothing that is staged is lost.

    A push that fails is tried again, after the others and after 1, 2, 4 ... 60 s, for as long as the process lives; one
    that the Hub refuses is not. Of two models staged for a revision, the newer is pushed. There is one worker, because
    hf_xet has one session per process, which a failing push aborts.

    Attributes:
        pushed: commit by revision, for what this process pushed and verified.
        failed: last error by revision, for what was tried and is not on the Hub.
        refused: the revisions in `failed` that this process will not try again.
        broken: why by name, for staged folders that hold no model.
    """

    def __init__(self, api: HfApi, output_dir: Path):
        self.api, self.folder = api, Path(output_dir) / PENDING
        self.pushed: dict[str, str] = {}
        self.failed: dict[str, Exception] = {}
        self.refused: set[str] = set()
        self._pushed_file = Path(output_dir) / PUSHED
        self._known = {push.key for push in read_rows(self._pushed_file, PUSH)}
        for leftover in self.folder.glob(".*"):  # of a staging that was cut off
            shutil.rmtree(leftover, ignore_errors=True)
        staged, self.broken = read_staged(self.folder)
        self._queue = {push.revision: (folder, push) for folder, push in staged}
        self._changed = threading.Condition()
        self._failures = 0  # in a row
        self._closed = False
        # PATCH(huggingface_hub<2.5): it waits forever for a server that accepts a connection and does not answer, or
        # answers a byte at a time. Waits for huggingface_hub/utils/_http.py:348. Delete when its client has time-outs.
        session = get_session()
        session.timeout, session.event_hooks = SILENCE, {**session.event_hooks, "response": [limit_answer]}
        threading.Thread(target=self._work, name="hub-push", daemon=True).start()

    def holds(self, source: Path, repo_id: str, revision: str) -> bool:
        """Return whether a model is queued for a revision, or was pushed there."""
        key = Push(repo_id, revision, "", None, model_checksums(source)).key
        with self._changed:
            return key in self._known or any(push.key == key for _, push in self._queue.values())

    def submit(self, source: Path, repo_id: str, revision: str, message: str, private: bool | None = None) -> None:
        """Stage a model and queue its push; return as soon as it is staged."""
        folder = self.folder / f"{time.time_ns()}-{slug(revision)}"
        push = Push(repo_id, revision, message, private, model_checksums(source))
        with whole_folder(folder) as entry:
            stage_model(source, entry / "model")
            (entry / "push.json").write_text(json.dumps(asdict(push)), encoding="utf-8")
        with self._changed:
            self.pushed.pop(revision, None)
            self.refused.discard(revision)
            self._queue[revision] = folder, push
            self._changed.notify_all()

    def wait(self, attempts: int = 4) -> None:
        """Block until everything is pushed or refused, or `attempts` in a row have failed."""
        with self._changed:
            self._failures = 0
            self._changed.notify_all()
            while not self._changed.wait_for(lambda: not self._unrefused() or self._failures >= attempts, REMINDER):
                logger.info("Waiting for the Hub: %s.", ", ".join(self._unrefused()))

    def close(self) -> None:
        """End the thread after its current push; what is not pushed stays staged."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def report(self) -> str | None:
        """Return what is not on the Hub, why, and how to push it; None when everything is."""
        with self._changed:
            revisions = sorted(self._queue)
            broken = [f"{self.folder / name} is not pushed: {why}." for name, why in sorted(self.broken.items())]
        if broken:
            broken.append("Remove them when you have saved what is of use in them.")
        if not revisions:
            return "\n".join(broken) or None
        reasons = "".join(f"\n  {revision}: {self.failed.get(revision, 'not tried yet')}" for revision in revisions)
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return (
            f"{len(revisions)} revision(s) were not pushed to the Hub:{reasons}\nTheir models ({size / 1e9:.3f} GB) "
            f"are kept in {self.folder}. Push them with: tunebook push {self.folder.parent}"
            + "".join(f"\n{line}" for line in broken)
        )

    def finish(self) -> str | None:
        """Wait, close and report."""
        self.wait()
        self.close()
        return self.report()

    def _unrefused(self) -> list[str]:
        return [revision for revision in self._queue if revision not in self.refused]

    def _work(self) -> None:
        result: str | Exception
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._unrefused())
                if self._closed:
                    return
                folder, push = self._queue[self._unrefused()[0]]
            try:
                push.check(folder / "model")
                result = push_model(self.api, folder / "model", push.repo_id, push.revision, push.message, push.private)
            except Exception as error:  # a thread has no caller to raise to: `report` and the callback show it
                result = error
            with self._changed:
                self._settle(folder, push, result)
                self._changed.notify_all()
                if self._failures:
                    self._changed.wait(min(2 ** (self._failures - 1), MAX_DELAY))

    def _settle(self, folder: Path, push: Push, result: str | Exception) -> None:
        revision = push.revision
        newest = self._queue.pop(revision)
        is_newest = newest[0] == folder
        if isinstance(result, str):
            self._failures = 0
            self.failed.pop(revision, None)
            self.pushed[revision] = result
            logger.info("Pushed %s to %s (%s).", revision, push.repo_id, result)
            with optional(PUSHED):
                append_rows(self._pushed_file, [asdict(push)], "repo_id", "revision", kind=PUSH)
            self._known.add(push.key)
            for staged in self.folder.glob(f"*-{slug(revision)}"):
                if staged <= folder:  # the older ones must not be pushed later
                    delete_folder(staged)
                    self.broken.pop(staged.name, None)
        elif isinstance(result, DamagedError):
            logger.warning("%s was not pushed to %s: %s", revision, push.repo_id, result)
            self.broken[folder.name] = str(result).rstrip(".")
        else:
            if str(result) != str(self.failed.get(revision)):
                logger.warning("%s was not pushed to %s: %s", revision, push.repo_id, result)
            self.failed[revision] = result
            if is_newest and is_refusal(result):
                self.refused.add(revision)
            else:
                self._failures += 1
        if not is_newest or not isinstance(result, str | DamagedError):
            self._queue[revision] = newest  # after the others


class NotPushedError(RecipeError):
    """Something is not on the Hub, and `hub_push_failure` is "raise"."""

    exit_code = 1


class PushToHubRevisionCallback(StagingCallback):
    """Pushes each checkpoint to `<hub_revision>-step-<step>`, the final model to `hub_revision` and, if asked, to main.

    With `hub_push_failure: raise` a push that the Hub refuses ends the run at the next save, once that checkpoint is
    staged, and one that could not be made by the end of the run makes it fail.
    """

    def __init__(self, args: RunConfig):
        self.args, self.uploads = args, Uploads(HfApi(), Path(args.output_dir))

    @staticmethod
    def validate(args: RunConfig, resumes: bool) -> None:
        """Raise what [`check_hub_revision`] raises, and a ValueError where a run would bury an earlier one's models."""
        if not args.push_to_hub_revision or resumes or not PartialState().is_main_process:
            return
        pending = Path(args.output_dir) / PENDING
        if any(pending.glob("[!.]*")):
            raise ValueError(
                f"{args.output_dir} holds models of an earlier run that are not on the Hub. Push them (tunebook push "
                f"{args.output_dir}), remove {pending}, or choose another `output_dir`."
            )
        check_hub_revision(HfApi(), args)

    def owes(self, checkpoint: Path) -> bool:
        revision = step_revision(self.args.hub_revision, step_of(checkpoint))
        return not self.uploads.holds(checkpoint, self.args.hub_model_id, revision)

    def stage(self, checkpoint: Path) -> None:
        step = step_of(checkpoint)
        self._submit(checkpoint, step_revision(self.args.hub_revision, step), f"Checkpoint at step {step}")

    def on_save(  # type: ignore[override]
        self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        super().on_save(args, state, control)
        if args.hub_push_failure == "raise" and self.uploads.refused:
            raise NotPushedError(self.uploads.report())

    def submit_final(self, model_folder: Path) -> None:
        """Queue the final model for its revisions."""
        for revision in final_revisions(self.args):
            with optional(f"a copy of the model for {revision} of the Hub"):
                self._submit(model_folder, revision, "Final model")

    def finish(self, state: TrainerState) -> None:
        """Wait for the Hub, and log what it does not have; with `hub_push_failure: raise` raise a NotPushedError."""
        self.uploads.wait()
        self.settle(Path(self.args.output_dir), state)  # what proved to be broken
        if report := self.uploads.finish():
            if self.args.hub_push_failure == "raise":
                raise NotPushedError(report)
            logger.warning(report)

    def _submit(self, folder: Path, revision: str, message: str) -> None:
        self.uploads.submit(folder, self.args.hub_model_id, revision, message, self.args.hub_private_repo)
