"""The script of one configuration: its source as one module, and that module packed."""

from __future__ import annotations

import ast
import functools
import json

from trainer.config import TrainConfig
from trainer.flatten.facts import facts_of, prepared, stand_ins, without_idle_rows
from trainer.flatten.fold import folded
from trainer.flatten.merge import merged
from trainer.flatten.objects import named_classes, without_unread_fields
from trainer.flatten.pack import packed
from trainer.flatten.parameters import settled
from trainer.flatten.reach import reachable
from trainer.flatten.shorten import shortened

ENTRY = "trainer.script"
MAX_PASSES = 12


def flattened(config: TrainConfig) -> ast.Module:
    """The program of a configuration: everything that it runs, and as little else as can be.
    Fused kernels read their own source and cannot be packaged.
    """
    tree = named_classes(merged(ENTRY, stand_ins(config)))
    facts = facts_of(config, tree)
    tree = prepared(tree, config, facts)
    before = (0, 0)
    for _ in range(MAX_PASSES):
        tree = settled(folded(without_idle_rows(tree, config), facts_of(config, tree)))
        tree = reachable(without_unread_fields(tree))
        after = _size(tree)
        if after == before:
            break
        before = after
    return tree


def _size(tree: ast.Module) -> tuple[int, int]:
    """Nodes, and constants among them: a pass that changes something changes one of them."""
    nodes = constants = 0
    for node in ast.walk(tree):
        nodes += 1
        constants += isinstance(node, ast.Constant)
    return nodes, constants


@functools.lru_cache(64)
def _script(settings: str) -> bytes:
    config = TrainConfig.from_dict(json.loads(settings))
    return packed(shortened(flattened(config)))


def script(config: TrainConfig) -> bytes:
    """train_gpt.py of a configuration. Where the data lies and the seed do not change it.

    Raises: ConfigError for what cannot be packaged.
    """
    config.with_overrides({"compress.code": "script"})
    fixed = config.with_overrides({"data.dir": "", "runtime.seed": 1337, "source.artifact": ""})
    return _script(json.dumps(fixed.to_dict(), sort_keys=True))


def readable(config: TrainConfig) -> str:
    """The same program before names and blanks are shortened."""
    return ast.unparse(flattened(config)) + "\n"
