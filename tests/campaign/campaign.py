"""What survives what: kills, full disks, damaged files, a failing Hub, hostile files, each tried many times.

`make campaign` runs all of it, in less than an hour on two cores, and prints a table. One part, or a share of it:
python tests/campaign/campaign.py --part kills --share 0.1. The same seed tries the same cases.

A run is a child that is forked from this process, so that the libraries load once.
"""

# ruff: noqa: E402
import argparse
import builtins
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]
import conftest
from conftest import assert_same_weights, build_model, build_tokenizer, question, save_model, write_rows
from hub_server import HubServer

from tunebook import run_script
from tunebook.checkpoints import find_checkpoint
from tunebook.data.sources import load_source
from tunebook.errors import RecipeError, exit_on_error
from tunebook.files import markdown_table, read_rows
from tunebook.following import benchmarks, hub
from tunebook.recipe import parse, read_recipe

STEPS, SAVES = 6, (2, 4, 6)
SFT_ROWS = [{"prompt": question(i) + " ", "completion": "five " * (1 + i % 5) + str(i)} for i in range(24)]
PAIR_ROWS = [{"prompt": question(i) + " ", "chosen": "five " * (1 + i % 5), "rejected": "one bad"} for i in range(24)]
RESULTS = {"results": {"arithmetic": {"acc,none": 0.5}}}
LM_EVAL = f"import sys; open(sys.argv[1] + '/results_1.json', 'w').write({json.dumps(RESULTS)!r})"


@dataclass
class Tally:
    """What became of the cases of a part. `lost`: work is gone. `silent`: something is wrong and nothing says so."""

    tried: int = 0
    lost: int = 0
    silent: int = 0
    tracebacks: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def held(self) -> int:
        return self.tried - self.lost - self.silent - self.tracebacks

    def count(self, case: str, fault: str | None) -> None:
        self.tried += 1
        if fault:
            kind = fault.split(":")[0]
            setattr(self, kind, getattr(self, kind) + 1)
            self.notes.append(f"{case}: {fault}")


class Place:
    """A folder with a model, rows and, for each task, the recipe and the result of a run that nothing disturbed."""

    def __init__(self, folder: Path):
        self.folder = folder
        tokenizer = build_tokenizer()
        self.model = save_model(folder / "model", build_model(len(tokenizer)), tokenizer)
        self.rows = {"sft": write_rows(folder / "sft.jsonl", SFT_ROWS)}
        self.rows |= dict.fromkeys(("rm", "dpo"), write_rows(folder / "pairs.jsonl", PAIR_ROWS))
        self.wholes: dict[str, Path] = {}

    def recipe(self, task: str, out: Path, **keys) -> dict:
        saves = {
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 2,
            "report_to": "none",
        }
        return conftest.short_recipe(self.model, self.rows[task], out, **saves | keys)

    def whole(self, task: str) -> Path:
        if task not in self.wholes:
            self.wholes[task] = self.folder / f"whole-{task}"
            assert start(task, self.recipe(task, self.wholes[task]), self.folder / "log").wait() == 0
        return self.wholes[task]

    def new(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))


@dataclass
class Child:
    pid: int
    log: Path

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)
        self.wait()


def start(task: str, keys: dict, log: Path, before: Callable[[], object] = lambda: None) -> Child:
    """Runs a recipe in a child, as the scripts do; `before` is called in it first."""
    if pid := os.fork():
        return Child(pid, log)
    logging.getLogger("tunebook").setLevel(logging.INFO)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        before()
        with exit_on_error():
            run_script(task, keys)
        code = 0
    finally:
        if code:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def finish(place: Place, task: str, keys: dict, log: Path) -> str | None:
    """Starts a run again until its end; returns what is wrong then."""
    code = start(task, keys, log).wait()
    if "Traceback" in log.read_text(errors="replace"):
        return f"tracebacks: {log}"
    if code:
        return f"lost: exit code {code}, {log}"
    try:
        assert_same_weights(Path(keys["output_dir"]), place.whole(task))
    except (AssertionError, StopIteration):
        return f"silent: other weights in {keys['output_dir']}"
    return None


def kills(place: Place, draw: random.Random, share: float) -> Tally:
    """SIGKILL at 20 random moments of a run of each task, which is then started again."""
    tally = Tally()
    for task in ("sft", "rm", "dpo"):
        begin = time.monotonic()
        start(task, place.recipe(task, place.new()), place.folder / "timed").wait()
        length = time.monotonic() - begin
        place.whole(task)
        for number in range(max(1, round(20 * share))):
            out = place.new()
            keys = place.recipe(task, out)
            log, moment = out.with_suffix(".log"), draw.uniform(0.2, 1) * length
            start(task, keys, log).kill_after(moment)
            tally.count(f"{task} {number} after {moment:.2f} s", finish(place, task, keys, log))
    return tally


# ---- A run that is followed -----------------------------------------------------------------------------------------


def followed(place: Place, out: Path) -> dict:
    following = {
        "push_to_hub_revision": True,
        "hub_model_id": "org/m",
        "hub_revision": "v1",
        "benchmarks": ["arithmetic"],
    }
    following |= {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset_name": str(place.rows["sft"])}
    following |= {"eval_prompts": ["what is 1 plus 1?", "and two?"], "eval_generation_kwargs": {"max_new_tokens": 2}}
    return place.recipe("sft", out, max_eval_samples=4, **following)


def reach(server: HubServer) -> None:
    """Lets this child reach the Hub on loopback, and stands in for lm-eval."""
    import huggingface_hub.constants as constants

    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET, constants.ENDPOINT = False, True, server.url
    os.environ["HF_TOKEN"] = "hf_write"
    hub.MAX_DELAY = 0.05
    time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.1))
    benchmarks.lm_eval_command = lambda benchmark, model, out, revision=None: [sys.executable, "-c", LM_EVAL, str(out)]


OPERATIONS = ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "open", "chmod", "utime")


def killed_at(number: int) -> None:
    """Kills this process before its file operation of this number; 0: counts them, and writes how many to stderr."""
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            reads = function is plain_open and not set("wax+") & set(str(kwargs.get("mode", (*args, "r", "r")[1])))
            count += not reads
            if count == number and not reads:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    plain_open = builtins.open
    builtins.open = counted(plain_open)
    for name in OPERATIONS:
        if name != "open":
            setattr(os, name, counted(getattr(os, name)))
    if not number:
        end = os._exit
        os._exit = lambda code: (sys.stderr.write(f"\noperations: {count}\n"), sys.stderr.flush(), end(code))


def follow_faults(server: HubServer, out: Path) -> str | None:
    """Returns what a followed run that ended lacks or has twice."""
    repo = server.repos["org/m"]
    for revision in [*(f"v1-step-{step:09d}" for step in SAVES), "v1"]:
        if "model.safetensors" not in (repo.files(revision) if revision in repo.branches else ()):
            return f"lost: revision {revision}"
    if sorted(row["step"] for row in read_rows(out / "benchmarks.jsonl")) != list(SAVES):
        return "lost: rows of benchmarks.jsonl"
    written = [(row["step"], row["prompt"]) for row in read_rows(out / "generations.jsonl")]
    if len(set(written)) != len(written) or {step for step, _ in written} != set(SAVES):
        return "silent: rows of generations.jsonl"
    left = [*(out / "hub_pending").iterdir(), *(out / "benchmarks").glob("*/*model*")]
    return f"silent: left {left}" if left else None


def operations(place: Place, draw: random.Random, share: float) -> Tally:
    """SIGKILL before file operations of a run with Hub, benchmarks and generations, which is then started again."""
    tally, out = Tally(), place.new()
    with HubServer() as server:
        log = out.with_suffix(".log")
        start("sft", followed(place, out), log, lambda: (reach(server), killed_at(0))).wait()
        total = int(log.read_text().rpartition("operations: ")[2].split()[0])
    for number in sorted(draw.sample(range(1, total + 1), max(1, round(min(120, total) * share)))):
        out = place.new()
        keys, log = followed(place, out), out.with_suffix(".log")
        with HubServer() as server:
            start("sft", keys, log, lambda number=number, server=server: (reach(server), killed_at(number))).wait()
            code = start("sft", keys, log, lambda server=server: reach(server)).wait()
            fault = follow_faults(server, out) if code == 0 else f"lost: exit code {code}, {log}"
        if "Traceback" in log.read_text(errors="replace"):
            fault = f"tracebacks: {log}"
        tally.count(f"operation {number} of {total}", fault)
    return tally


def disks(place: Place, draw: random.Random, share: float) -> Tally:
    """A disk with room for part of a followed run, which is started again with room."""
    tally, out = Tally(), place.new()
    with HubServer() as server:
        start("sft", followed(place, out), out.with_suffix(".log"), lambda: reach(server)).wait()
    size = sum(path.stat().st_size + 4096 for path in out.rglob("*") if path.is_file())
    for number in range(max(1, round(40 * share))):
        disk, room = place.new(), int(draw.uniform(0.02, 1.05) * size)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            tally.notes.append("not tried: a tmpfs may not be mounted here")
            return tally
        keys, log, fault = followed(place, disk / "o"), disk.with_suffix(".log"), None
        with HubServer() as server:
            first = start("sft", keys, log, lambda server=server: reach(server)).wait()
            subprocess.run([*mount[:4], "remount,size=1G", "tmpfs", str(disk)], check=True)
            code = start("sft", keys, log, lambda server=server: reach(server)).wait()
            said = log.read_text(errors="replace")
            if "Traceback" in said:
                fault = f"tracebacks: {log}"
            elif code or first not in (0, 1):
                fault = f"lost: exit codes {first} and {code}, {log}"
            else:
                fault = follow_faults(server, disk / "o")
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        tally.count(f"disk {number} of {room:,} bytes", fault)
    return tally


# ---- Without a run --------------------------------------------------------------------------------------------------

ROUTES = "whoami repos/create /commits/ /branch/ /preupload/ objects/batch /lfs-objects/ /commit/ /tree/".split()
ANSWERS = [400, 401, 403, 404, 408, 409, 429, 500, 502, 503, 504, "drop", "delay"]


def hub_faults(place: Place, draw: random.Random, share: float) -> Tally:
    """Each route of the Hub answers with each fault, twice or for ever, while a checkpoint is pushed."""
    tally = Tally()
    cases = [(route, answer, times) for route in ROUTES for answer in ANSWERS for times in (2, 10**6)]
    for route, answer, times in draw.sample(cases, max(1, round(len(cases) * share))):
        out = place.new()
        log = out.with_suffix(".log")
        with HubServer() as server:
            if answer == "drop":
                server.drop(route, times)
            elif answer == "delay":
                server.delay(route, 0.2)
            else:
                server.fail(route, answer, times)
            following = {"push_to_hub_revision": True, "hub_model_id": "org/m", "hub_revision": "v1"}
            keys = place.recipe("sft", out, max_steps=2, hub_push_failure=draw.choice(["warn", "raise"]), **following)
            code = start("sft", keys, log, lambda server=server: reach(server)).wait()
            said, repo = log.read_text(errors="replace"), server.repos.get("org/m")
            pushed = repo is not None and {"v1", "v1-step-000000002"} <= {
                name for name in repo.branches if "model.safetensors" in repo.files(name)
            }
        fault = None
        if "Traceback" in said:
            fault = f"tracebacks: {log}"
        elif code == 0 and not pushed and "tunebook push" not in said:
            fault = f"silent: {log}"
        elif not pushed and code == 0 and not [*(out / "hub_pending").glob("*/push.json")]:
            fault = f"lost: {log}"
        tally.count(f"{route} {answer} x {times}", fault)
    return tally


def damaged(path: Path, draw: random.Random) -> Iterator[str]:
    """Damages a file in ten ways, one after the other."""
    content = path.read_bytes()
    flips = {f"bit {draw.randrange(max(1, len(content) * 8))}": None for _ in range(4)}
    ways = {"empty": b"", "half": content[: len(content) // 2], "longer": content + b"\0", "zeros": bytes(len(content))}
    for way, other in {**ways, "list": b"[]", "deleted": None, **flips}.items():
        if way.startswith("bit"):
            flipped, bit = bytearray(content), int(way.split()[1])
            flipped[bit // 8] ^= 1 << bit % 8
            other = bytes(flipped)
        path.unlink()
        if other is not None:
            path.write_bytes(other)
        yield way
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def damages(place: Place, draw: random.Random, share: float) -> Tally:
    """Each file of the last checkpoint, damaged in ten ways."""
    tally, out = Tally(), place.new() / "o"
    shutil.copytree(place.whole("sft"), out)
    for path in sorted((out / f"checkpoint-{STEPS}").iterdir()):
        for way in damaged(path, draw):
            try:
                found = find_checkpoint(out, "auto")
                fault = None if found == out / "checkpoint-4" else f"silent: {found} is taken"
            except Exception as error:
                fault = f"tracebacks: {error!r}"
            tally.count(f"{path.name} {way}", fault)
    return tally


def pairs(place: Place, draw: random.Random, share: float) -> Tally:
    """Two runs in one folder, the second after a random time."""
    tally = Tally()
    for number in range(max(1, round(10 * share))):
        out = place.new()
        keys, logs = place.recipe("sft", out), [out.with_suffix(f".{n}.log") for n in (1, 2)]
        first = start("sft", keys, logs[0])
        time.sleep(draw.uniform(0, 1.5))
        second = start("sft", keys, logs[1])
        codes, said = (first.wait(), second.wait()), [log.read_text(errors="replace") for log in logs]
        fault = None
        if "Traceback" in said[0] + said[1]:
            fault = f"tracebacks: {logs}"
        elif sorted(codes) not in ([0, 2], [0, 0]) or (2 in codes and "is in use by" not in said[codes.index(2)]):
            fault = f"silent: exit codes {codes}, {logs}"
        tally.count(f"pair {number}", fault or finish(place, "sft", keys, logs[0]))
    return tally


JUNK = [b"\n", b": ", b"- ", b"*a", b"[", b"}", b'"', b"\x00", b"1e999", b"null"]


def mutate(content: bytes, draw: random.Random) -> bytes:
    mutated = bytearray(content)
    for _ in range(draw.randint(1, 10)):
        place = draw.randrange(len(mutated) + 1)
        if draw.random() < 0.5:
            mutated[place:place] = draw.choice([*JUNK, bytes([draw.randrange(256)])])
        else:
            del mutated[place : place + draw.randint(1, 30)]
    return bytes(mutated)


def attempt(tally: Tally, case: str, function: Callable[[], object]) -> None:
    """Counts a case that succeeds, or is refused in a short message."""
    try:
        function()
        fault = None
    except RecipeError as error:
        fault = "tracebacks: a message of 20 KB" if len(str(error)) > 20_000 else None
    except Exception as error:
        fault = f"tracebacks: {error!r}"[:300]
    tally.count(case, fault)


def recipes(place: Place, draw: random.Random, share: float) -> Tally:
    """300 shipped recipes with bytes changed."""
    tally, path = Tally(), place.new() / "r.yaml"
    shipped = sorted((conftest.ROOT / "recipes").rglob("*.yaml"))
    for number in range(round(300 * share)):
        source = draw.choice(shipped)
        task = next(task for task in ("sft", "rm", "dpo") if task in (source.stem, source.parent.name))
        path.write_bytes(mutate(source.read_bytes(), draw))
        attempt(tally, f"recipe {number}", lambda task=task: parse(task, read_recipe(path)))
    return tally


def data_files(place: Place, draw: random.Random, share: float) -> Tally:
    """200 data files with bytes changed."""
    tally = Tally()
    for number in range(round(200 * share)):
        content = json.dumps(draw.choice([SFT_ROWS, PAIR_ROWS])) if number % 3 == 0 else None
        content = content or "".join(json.dumps(row) + "\n" for row in draw.choice([SFT_ROWS, PAIR_ROWS]))
        path = place.new() / f"rows.{'json' if number % 3 == 0 else 'jsonl'}"
        path.write_bytes(mutate(content.encode(), draw))
        attempt(tally, f"data {number}", lambda path=path: load_source(str(path), "train"))
    return tally


PARTS = (kills, operations, disks, hub_faults, damages, pairs, recipes, data_files)


def run(folder: Path, parts=PARTS, share: float = 1.0, seed: int = 0) -> dict[str, Tally]:
    place = Place(folder)
    logging.getLogger("tunebook").setLevel(logging.CRITICAL)
    tallies = {}
    for part in parts:
        begin = time.monotonic()
        tallies[part.__name__] = part(place, random.Random(seed), share)
        sys.stderr.write(f"{part.__name__}: {time.monotonic() - begin:.0f} s\n")
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    columns = ("tried", "held", "lost", "silent", "tracebacks")
    rows = [[name, *(getattr(tally, column) for column in columns)] for name, tally in tallies.items()]
    return markdown_table(["part", *columns], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--share", type=float, default=1.0, help="of the cases")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chosen = [part for part in PARTS if part.__name__ in (given.part or [part.__name__])]
    tallies = run(Path(tempfile.mkdtemp(prefix="campaign-")), chosen, given.share, given.seed)
    sys.stdout.write(table(tallies) + "\n")
    for tally in tallies.values():
        sys.stdout.writelines(f"{note}\n" for note in tally.notes)
    sys.exit(any(tally.held < tally.tried for tally in tallies.values()))
