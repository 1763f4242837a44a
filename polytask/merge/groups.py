"""Groups of tasks: who learns together and who alone, and one merged adapter for those of a group that learned alone.

What learns, scores and merges is given (`Groups`), so that this room needs no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, DataError, listing, nearest
from polytask.core.storage import write, writing
from polytask.core.task import Task
from polytask.forms.lora import LoRAPatch

JOINT, ALONE = "joint", "separate"
KINDS = (JOINT, "merged", ALONE)  # of adapters that are stored


# The plan


def by_gain(gains: Mapping[str, float]) -> dict[str, str]:
    """A task whose gain from learning together (joint minus separate) is zero or more shares, another does not."""
    return {task: JOINT if gain >= 0 else ALONE for task, gain in gains.items()}


def by_direction(directions: Mapping[str, str], pivot: str = "en") -> dict[str, str]:
    """The fixed plan of translation: into the pivot language separate, out of it together.

    Args:
        directions: by task: ``de-en``, ``de->en``, or ``xx-en``.
        pivot: the language that is at one end of each.

    Reference: Asymmetric Conflict and Synergy in Post-training for LLM-based Multilingual Machine Translation,
    arXiv 2502.11223.

    Raises:
        ConfigError: a direction that is none, or that has the pivot at no end or at both.
    """
    chosen = {}
    for task, said in directions.items():
        ends = [end.strip().lower() for end in re.split(r"->|\u2192|-", str(said))]
        if len(ends) != 2 or not all(ends) or (ends[0] == pivot.lower()) == (ends[1] == pivot.lower()):
            raise ConfigError(
                f"the task {task!r} has the direction {said!r}; write two languages with {pivot!r} at one end, as in de-{pivot}"
            )
        chosen[task] = ALONE if ends[1] == pivot.lower() else JOINT
    return chosen


def stored(plan: Mapping[str, str], groups: Mapping[str, Sequence[str]], merging: bool = True) -> list[dict[str, Any]]:
    """The adapters that a plan leaves: name, kind, group and tasks of each. One is joint for those of a group that share; those
    that do not are merged into one, or kept each.

    Args:
        plan: of each task.
        groups: the tasks of each.
        merging: whether what learned alone is merged.
    """
    made: list[dict[str, Any]] = []
    for group, tasks in groups.items():
        together = [task for task in tasks if plan[task] == JOINT]
        alone = [task for task in tasks if plan[task] == ALONE]
        if len(together) == 1:  # learning together with nobody is learning alone, and what gains from it is not merged
            made.append({"name": together[0], "kind": ALONE, "group": group, "tasks": together})
        elif together:
            made.append({"name": f"{group}-joint", "kind": JOINT, "group": group, "tasks": together})
        if len(alone) > 1 and merging:
            made.append({"name": f"{group}-merged", "kind": "merged", "group": group, "tasks": alone})
        else:
            made += [{"name": task, "kind": ALONE, "group": group, "tasks": [task]} for task in alone]
    return made


def groups_of(given: Mapping[str, Any] | None, tasks: Sequence[Task]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The tasks of each group, and the directions of those that have one.

    Args:
        given: group to its tasks: a list of names, or a mapping of names to directions. The tasks' own fields when None.
        tasks: all of them, each in one group.

    Raises:
        ConfigError: a task is in no group or in two, or is not there.
    """
    directions = {task.name: task.direction for task in tasks if task.direction}
    found: dict[str, list[str]] = {}
    if given is None:
        for task in tasks:
            if task.group:
                found.setdefault(task.group, []).append(task.name)
    for group, own in (given or {}).items():
        if isinstance(own, str) or not isinstance(own, Mapping | Sequence) or not own:
            raise ConfigError(
                f"the group {group!r} must be a list of tasks, or a mapping of tasks to directions, got {own!r}"
            )
        found[str(group)] = [str(task) for task in own]
        if isinstance(own, Mapping):
            directions |= {str(task): str(direction) for task, direction in own.items()}
    names = [task.name for task in tasks]
    placed = [task for own in found.values() for task in own]
    for name in placed:
        if name not in names:
            raise ConfigError(f"there is no task {name!r}{nearest(name, names)}; there are: {listing(names)}")
        if placed.count(name) > 1:
            raise ConfigError(f"the task {name!r} is named twice in the groups; a task is in one")
    for group in found:
        if "/" in group or {f"{group}-{kind}" for kind in (JOINT, "merged", "shared")} & set(names):
            raise ConfigError(
                f"the group {group!r} would give an adapter the name of a task or a path; call it otherwise"
            )
    left = [name for name in names if name not in placed]
    if left:
        raise ConfigError(
            f"in no group: {listing(left)}; say group in their task.yaml, or give a file of groups with their tasks (--groups)"
        )
    return found, directions


# What came out


@dataclass
class Groupwise:
    """What `Groups.run` found, as plain values.

    Attributes:
        rows: a task each: group, direction, plan, scores on dev of ``separate`` and ``joint`` and the ``gain`` (None where
            the plan was fixed), the adapter that serves it, its metric and its score on test.
        adapters: those that are stored: name, kind, group, tasks, parameters, bytes, and of a merged LoRA the error of its rank.
        totals: numbers of adapters and parameters, as stored and without merging.
        settings: how it was done.
        made: the adapters by name, no part of the JSON.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    adapters: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Adapter] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All of it but ``made``, JSON-able."""
        return {name: value for name, value in vars(self).items() if name != "made"}

    def save(self, folder: str | Path) -> Path:
        """Writes ``groupwise.json`` and a folder for each adapter in ``adapters``."""
        target = Path(folder).expanduser()
        for name, adapter in self.made.items():
            adapter.save(target / "adapters" / name)
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            write(target / "groupwise.json", (json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n").encode())
        return target

    def __str__(self) -> str:
        head = ("task", "group", "plan", "separate", "joint", "gain", "adapter", "score")
        lines = [[*head]]
        for row in self.rows:
            measured = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("separate", "joint", "gain")]
            lines.append([row["task"], row["group"], row["plan"], *measured, row["adapter"], f"{row['score']:.3f}"])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        whole, apart = self.totals["stored"], self.totals["unmerged"]
        text.append(
            f"stored: {whole['adapters']} adapters, {whole['parameters']:,} parameters; without merging: "
            f"{apart['adapters']} adapters, {apart['parameters']:,} parameters"
        )
        return "\n".join(text)


# How it is done


@dataclass
class Groups:
    """One run: measures where there is nothing fixed, learns what lacks, merges, and scores.

    Attributes:
        tasks: all of them, by name.
        groups: the tasks of each.
        directions: of tasks, where they have one.
        learn: an adapter from tasks, by its name; called once for each name.
        merge: one adapter from several, by its name and their tasks.
        score: an adapter on a split of a task: the value, the metric's name, and whether higher is better.
        fixed: the plan, or None to measure it.
        merging: whether what learned alone is merged.
        say: is told what goes on.
    """

    tasks: Mapping[str, Task]
    groups: Mapping[str, Sequence[str]]
    directions: Mapping[str, str]
    learn: Callable[[str, Sequence[Task]], Adapter]
    merge: Callable[[str, Sequence[Adapter], Sequence[Task]], Adapter]
    score: Callable[[Adapter, Task, str], tuple[float, str, bool]]
    fixed: Mapping[str, str] | None = None
    merging: bool = True
    say: Callable[[str], None] = lambda text: None
    _made: dict[str, Adapter] = field(default_factory=dict)

    def run(self) -> Groupwise:
        measured = {} if self.fixed is not None else self._measured()
        plan = dict(self.fixed) if self.fixed is not None else by_gain({t: m["gain"] for t, m in measured.items()})
        result = Groupwise()
        for entry in stored(plan, self.groups, self.merging):
            adapter = result.made[entry["name"]] = self._adapter(entry)
            merge = adapter.card.training.get("merge", {})
            error = merge.get("relative_error") if entry["kind"] == "merged" else None
            size = sum(p.numel() * p.element_size() for p in adapter.parameters())
            result.adapters.append({**entry, "parameters": adapter.size, "bytes": size, "relative_error": error})
            for name in entry["tasks"]:
                value, metric, higher = self.score(adapter, self.tasks[name], "test")
                nothing = {"separate": None, "joint": None, "gain": None}
                result.rows.append(
                    {
                        "task": name, "group": entry["group"], "direction": self.directions.get(name, ""),
                        "plan": plan[name], **measured.get(name, nothing), "adapter": entry["name"], "metric": metric,
                        "higher_is_better": higher, "score": value,
                    }
                )  # fmt: skip
        apart = [self._adapter(entry) for entry in stored(plan, self.groups, merging=False)]
        result.totals = {
            "stored": {"adapters": len(result.made), "parameters": sum(a.size for a in result.made.values())},
            "unmerged": {"adapters": len(apart), "parameters": sum(a.size for a in apart)},
        }
        return result

    def _measured(self) -> dict[str, dict[str, float]]:
        """Of each task on dev: its own adapter's score, that of its whole group's, and the gain (more is better)."""
        found = {}
        for group, names in self.groups.items():
            for name in names:
                if not self.tasks[name].dev:
                    raise DataError(f"the task {name!r} has no dev split, on which gains are measured; give it one")
            together = self._learned(self._name(group, names), names)
            for name in names:
                alone, _, higher = self.score(self._learned(name, [name]), self.tasks[name], "dev")
                joint, _, _ = self.score(together, self.tasks[name], "dev")
                found[name] = {"separate": alone, "joint": joint, "gain": joint - alone if higher else alone - joint}
                self.say(f"{name}: separate {alone:.4f}, joint {joint:.4f}")
        return found

    def _name(self, group: str, names: Sequence[str]) -> str:
        """Of what is learned together: the whole group, or those of it that share."""
        whole = len(names) == len(self.groups[group])
        return names[0] if len(names) == 1 else f"{group}-joint" if whole else f"{group}-shared"

    def _adapter(self, entry: Mapping[str, Any]) -> Adapter:
        if entry["kind"] == "merged":
            if entry["name"] not in self._made:
                parts = [self._learned(task, [task]) for task in entry["tasks"]]
                self.say(f"merging {listing(entry['tasks'])}")
                self._made[entry["name"]] = self.merge(
                    entry["name"], parts, [self.tasks[task] for task in entry["tasks"]]
                )
            return self._made[entry["name"]]
        return self._learned(self._name(entry["group"], entry["tasks"]), entry["tasks"])

    def _learned(self, name: str, tasks: Sequence[str]) -> Adapter:
        if name not in self._made:
            self.say(f"learning {name} ({listing(tasks)})")
            self._made[name] = self.learn(name, [self.tasks[task] for task in tasks])
        return self._made[name]


def rank_of(adapters: Sequence[Adapter]) -> int | None:
    """The largest rank of LoRAs, which a merged one of the same size has; None of other forms."""
    patches = [patch for adapter in adapters for patch in adapter.patches.values()]
    ranks = [patch.form.rank for patch in patches if isinstance(patch, LoRAPatch)]
    return max(ranks) if patches and len(ranks) == len(patches) else None
