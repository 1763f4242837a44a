"""Who came from whom: the adapters of a library and the hashes that their cards name as parents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .entry import Entry


@dataclass(frozen=True)
class Node:
    """An adapter of the family.

    Attributes:
        name: what it is called; the beginning of its hash where the library does not have it.
        hash: of its values.
        form: its form's name; empty where it is not known.
        state: ``there``, ``removed``, or ``unknown`` to the library.
        level: 0 without parents, else one more than the largest of theirs.
    """

    name: str
    hash: str
    form: str
    state: str
    level: int


@dataclass(frozen=True)
class Graph:
    """The family.

    Attributes:
        nodes: by level, then name.
        edges: (parent, child) by their places in ``nodes``.
    """

    nodes: list[Node]
    edges: list[tuple[int, int]]

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        """A tree: a child of several parents stands under each, with its own children under the first only."""
        children: dict[int, list[int]] = {}
        for parent, child in self.edges:
            children.setdefault(parent, []).append(child)
        lines: list[str] = []
        told: set[int] = set()
        todo = [(i, 0) for i, node in reversed(list(enumerate(self.nodes))) if node.level == 0]
        while todo:
            i, depth = todo.pop()
            node = self.nodes[i]
            facts = [text for text in (node.form, "" if node.state == "there" else node.state) if text]
            again = i in told and i in children
            lines.append(
                f"{'  ' * depth}{node.name}{f' ({chr(44).join(facts)})' if facts else ''}{' ...' if again else ''}"
            )
            if i not in told:
                todo += [(child, depth + 1) for child in reversed(children.get(i, []))]
            told.add(i)
        return "\n".join(lines)


def graph(entries: Iterable[Entry]) -> Graph:
    """The family of some entries. Entries with the same values are one node, called by the first name."""
    known: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda e: (e.state != "there", e.name)):
        known.setdefault(entry.hash, entry)
    parents = {hash: [p for p in dict.fromkeys(entry.parents) if p != hash] for hash, entry in known.items()}
    for parent in [p for found in parents.values() for p in found]:
        if parent not in known:
            known[parent] = Entry(parent[:12], hash=parent, state="unknown")
    levels = _levels({hash: parents.get(hash, []) for hash in known})
    nodes = [Node(entry.name, hash, entry.form, entry.state, levels[hash]) for hash, entry in known.items()]
    nodes.sort(key=lambda node: (node.level, node.name, node.hash))
    place = {node.hash: i for i, node in enumerate(nodes)}
    edges = [(place[p], place[child]) for child, found in parents.items() for p in found]
    return Graph(nodes, sorted(edges))


def _levels(parents: dict[str, list[str]]) -> dict[str, int]:
    """0 without parents, else one more than the largest of theirs; a card that names itself by a circle ends the count."""
    levels = dict.fromkeys(parents, 0)
    for _ in parents:
        moved = {h: max((levels[p] + 1 for p in found), default=0) for h, found in parents.items()}
        if moved == levels:
            break
        levels = moved
    return levels
