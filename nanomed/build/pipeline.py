"""A build from its files to its last stage: the plan, the stages in their order, what they kept.

The same command goes on where a killed one stopped. A build whose settings, files or code differ
from those of its folder is refused: it belongs in another folder.
"""

import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanomed.build import shards
from nanomed.build.files import differences, whole
from nanomed.build.runner import Runner
from nanomed.build.shards import Judge, Tally, packed
from nanomed.config import InputError
from nanomed.locks import take
from nanomed.store.cache import PACKAGE, digest

PAGES = (
    *("files.py", "text.py", "shards.py", "duplicates.py", "rules.py", "private.py"),
    *("decontaminate.py", "labels.py", "classifier.py", "linear.py", "reader.py"),
    *("words.txt", "prompts.toml"),
)
EDGE = 1 << 20  # bytes: a file is known by its size, its beginning and its end


@dataclass
class Build:
    out: Path
    files: list[str]  # sorted: their order is part of the documents' ids
    fields: list[str]
    show_text: bool
    shard_chars: int  # a shard is some seconds' work, and what a kill may cost
    runner: Runner
    chats: bool = False  # every record is read as a chat, whatever else it holds

    def begin(self, settings: dict[str, Any], others: list[str]) -> None:
        """Writes the plan or compares it with the one that is there; `others` are files that the
        result depends on, too. Raises InputError."""
        facts = {path: facts_of(path) for path in self.files + others}
        pages = [*sorted(PACKAGE.glob("records/*.py")), *(PACKAGE / f"build/{p}" for p in PAGES)]
        code = {str(page.relative_to(PACKAGE)): digest(page) for page in pages}
        plan = json.loads(json.dumps({**settings, **facts, **code}))
        path = self.out / "plan.json"
        if self.runner.is_main:
            self._lock = take(self.out / ".lock", patience=3.0)  # a killed run's workers end
            if not path.exists():
                if any(self.out.glob("*/*.done.json")):
                    raise InputError(f"{self.out} holds a build but no plan.json that says of what")
                for n in range(len(self.files)):  # what holds no documents stops the build now
                    next(shards.read_documents(self.files, [n], self.fields, self.chats))
                with whole(path) as file:
                    file.write(json.dumps(plan, ensure_ascii=False, indent=1).encode())
        elif not path.exists():  # under Slurm rank 0 may begin later, or have ended with an error
            print(f"rank {self.runner.rank} waits for rank 0 to write {path}", flush=True)
        while not path.exists():
            time.sleep(0.1)
        if different := differences(json.loads(path.read_text("utf-8")), plan):
            raise InputError(
                f"{self.out} holds another build: {different}. Give the settings and files that it "
                "was begun with, or another --out"
            )

    def read(self) -> tuple[list[Path], list[int], Tally]:
        """Cuts all files into shards: (their paths, the group of files of each, the tally)."""
        out, groups = self.out / "0-read", shards.groups(self.files)
        how = dict(files=self.files, fields=self.fields, chats=self.chats)
        how |= dict(show_text=self.show_text)
        task = partial(shards.read_group, out=out, shard_chars=self.shard_chars, **how)
        marks = self.runner.run(out / "groups", task, len(groups))
        names = [f"{g:05d}-{k:03d}" for g, said in enumerate(marks) for k in range(said["shards"])]
        tallies = [json.loads((out / f"{name}.done.json").read_text("utf-8")) for name in names]
        paths = [out / f"{name}.jsonl.gz" for name in names]
        return paths, [int(name[:5]) for name in names], Tally.of(tallies)

    def judge(
        self, folder: Path, paths: list[Path], judge: Judge, aside: bool = False
    ) -> tuple[list[Path], Tally]:
        """One stage: what it keeps of each shard, and the tally."""
        how = dict(files=self.files, show_text=self.show_text)
        how |= dict(judge=judge, aside=aside)
        task = partial(shards.judge_shard, shards=paths, out=folder, **how)
        tally = Tally.of(self.runner.run(folder, task, len(paths)))
        return [folder / f"{i:05d}.jsonl.gz" for i in range(len(paths))], tally

    def gather(self, name: str, folder: Path, paths: list[Path], groups: list[int]) -> None:
        """Puts shards together, group by group of files, in `folder`; OUT/name points there."""
        of_group = [[] for _ in shards.groups(self.files)]
        for path, group in zip(paths, groups, strict=True):
            of_group[group].append(path)
        self.runner.run(folder, partial(write_final, out=folder, shards=of_group), len(of_group))
        if self.runner.is_main:
            new = self.out / f".{name}"
            new.unlink(missing_ok=True)
            new.symlink_to(folder.relative_to(self.out))
            new.rename(self.out / name)

    def say(self, text: str) -> None:
        if self.runner.is_main:
            print(text, flush=True)


# A stage: (build, its folder, the shards, their tally) -> its judge, or why it does not run.
Prepare = Callable[[Build, Path, list[Path], Tally], Judge | str]
# What stages put aside, and the folder that it ends in when the last stage has judged it too.
ASIDE = {"domain": "stage1-general", "quality": "stage1-medical"}


def run(build: Build, stages: list[tuple[str, Prepare]]) -> list[tuple[str, Tally]]:
    """All stages, one after another, then OUT/final and what was put aside for stage 1. The name
    and the tally of each stage, `read` first; last what the final stage did with what was put
    aside."""
    paths, groups, tally = build.read()
    found = [("read", tally)]
    build.say(described("read", tally))
    last, aside, judge = build.out / "0-read", {}, None
    for number, (name, prepare) in enumerate(stages, 1):
        folder = build.out / f"{number}-{name}"
        judge = prepare(build, folder, paths, tally)
        if isinstance(judge, str):
            build.say(f"{name} DOES NOT RUN: {judge}")
            found.append((name, Tally(read=tally.kept, not_run=judge)))
            continue
        paths, tally = build.judge(folder, paths, judge, aside=name in ASIDE)
        if name in ASIDE:
            aside[ASIDE[name]] = [folder / path.name.replace(".", ".aside.", 1) for path in paths]
        found.append((name, tally))
        build.say(described(name, tally))
        if build.runner.is_main:
            for large in folder.glob("*/*.npy"):  # what later stages do not look at
                large.unlink() if large.parent.name != "gone" else None
        last = folder
    build.gather("final", last / "final", paths, groups)
    for kind, put in aside.items() if found[-1][0] == "decontaminate" else ():
        if not isinstance(judge, str):
            put, tally = build.judge(last / kind, put, judge)
            found.append((kind, tally))
            build.say(described(kind, tally))
        build.gather(kind, last / f"{kind}-final", put, groups)
    if build.runner.is_main:  # not before: other ranks may be writing theirs
        for left in build.out.rglob("*.unfinished"):
            left.unlink(missing_ok=True)
    return found


def described(name: str, tally: Tally) -> str:
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in sorted(tally.dropped.items()))
    return f"{name}: {tally.read:,} read, {tally.kept:,} kept, dropped: {dropped or 'none'}"


def write_final(g: int, out: Path, shards: list[list[Path]]) -> dict[str, int]:
    """What the last stage kept of a group of files, in one file: its bytes do not depend on how the
    group was cut into shards."""
    n = 0
    with whole(out / f"{g:05d}.jsonl.gz") as raw, packed(raw) as file:
        for path in shards[g]:
            with gzip.open(path) as lines:
                for line in lines:
                    file.write(line)
                    n += 1
    if not n:
        (out / f"{g:05d}.jsonl.gz").unlink()  # an empty file would stop whoever reads it
    return {"documents": n}


def facts_of(path: str | Path) -> list:
    """A file's size, and the digest of its beginning and end. Raises InputError."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            ends = hashlib.sha256(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            ends.update(file.read())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    return [size, ends.hexdigest()[:16]]
