"""What a configuration settles before the program is flattened: the one place that knows names.

A row that is missing costs bytes; a row that is wrong breaks the script, which the tests train for
small copies of the recipes. Loads without torch.
"""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from trainer.account import parameter_table
from trainer.config import TrainConfig
from trainer.config.row_schedule import row_stages
from trainer.flatten.fold import Facts
from trainer.flatten.syntax import literal
from trainer.layer_pattern import select_layers
from trainer.legality import illegal_in_use
from trainer.mix import lanes_of

_ALIASES = {"DataSettings": "DataConfig"}
"""Protocols that stand for settings."""
_NOT_CALLED = {"to_dict", "from_dict", "flat", "difference", "digest", "with_overrides"}
"""Methods of settings that share their names with others."""
OPEN = {("DataConfig", "dir"), ("RuntimeConfig", "seed"), ("SourceConfig", "artifact")}
"""Settings that the script takes from its command line."""
_COMPUTED = {"TrainConfig": ("recur_phases", "step_seconds"), "DataConfig": ("row_lengths",)}
"""Properties that are worked out now."""
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "select_layers": select_layers,
    "row_stages": row_stages,
    "lanes_of": lanes_of,
    "illegal_in_use": illegal_in_use,
}


def facts_of(config: TrainConfig, tree: ast.Module) -> Facts:
    """What the settings say about the merged program."""
    objects = dict(_groups(config))
    open_names = _changing_fields(tree, objects)
    fields: dict[tuple[str, str], ast.expr] = {}
    for name, settings in objects.items():
        for field in [*type(settings).model_fields, *_COMPUTED.get(name, ())]:
            value = _literal_of(getattr(settings, field))
            if value is not None and field not in open_names and (name, field) not in OPEN:
                fields[name, field] = value
    layers = config.model.layers_of
    methods = {("ModelConfig", "layers_of"): layers}
    return Facts(fields, _FUNCTIONS, methods, *_constant_names(config), objects)


def _literal_of(value: Any) -> ast.expr | None:
    if isinstance(value, (bool, int, float, str, type(None))):
        return (
            ast.Constant(value)
            if not isinstance(value, (int, float)) or value >= 0
            else literal(value)
        )
    return literal(value)


def _groups(config: TrainConfig) -> Iterator[tuple[str, BaseModel]]:
    yield type(config).__name__, config
    for field in type(config).model_fields:
        settings = getattr(config, field)
        yield type(settings).__name__, settings


def _changing_fields(tree: ast.Module, objects: Mapping[str, BaseModel]) -> set[str]:
    """Fields that copies of settings change, wherever they are made."""
    return {
        key.value
        for top in tree.body
        if _copies(top)
        for function in ([top] if isinstance(top, ast.FunctionDef) else top.body)  # type: ignore[attr-defined]
        if _copies(function)
        for node in ast.walk(function)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant)
        and isinstance(key.value, str)
        and not _is_as_before(key.value, value, objects)
    }


def _copies(node: ast.AST) -> bool:
    return isinstance(node, (ast.ClassDef, ast.FunctionDef)) and any(
        isinstance(inner, ast.Attribute) and inner.attr == "model_copy" for inner in ast.walk(node)
    )


def _is_as_before(field: str, value: ast.expr, objects: Mapping[str, BaseModel]) -> bool:
    """Whether a copy that sets the field to this changes nothing."""
    if not isinstance(value, ast.Constant):
        return False
    found = [getattr(owner, field) for owner in objects.values() if hasattr(owner, field)]
    return all(type(one) is type(value.value) and one == value.value for one in found)


def _constant_names(config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments, and attributes, that always have one value in this run, by name."""
    arguments: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    if config.evaluate.ttt != "documents":
        arguments |= {"adapters": None}
        attributes |= {"adapters": None, "all_adapters": ()}
    if config.model.num_loops == 1:
        if config.model.recur_visits == 1:
            arguments["repeat"] = None
        # Adapters of documents go by that name too.
        if not config.model.recur_lora_rank and config.evaluate.ttt != "documents":
            arguments["lora"] = attributes["lora"] = None
    return arguments, attributes


def kept_keys(config: TrainConfig) -> dict[str, set[str]]:
    """Table at the top of a module -> the keys that this run looks up."""
    backends: set[str] = {config.runtime.attention}
    if config.runtime.attention == "auto":
        backends = {"sdpa"}
        if config.model.window or config.model.document_attention:
            backends.add("flex")
    elif config.runtime.attention == "fastest":
        backends = {"sdpa", "cudnn", "flex", "flash4"}
    return _schemes(config) | {
        "ATTENTION": backends,
        "AUTO": backends,
        "AVERAGES": {config.average.kind},
        "CODECS": {config.compress.codec, "brotli"},
        "METHODS": {"off", config.evaluate.ttt},
        "ORTHOGONALIZATIONS": {config.optim.orthogonalization},
        "ROW_ORDERS": {config.data.loader},
    }


def _schemes(config: TrainConfig) -> dict[str, set[str]]:
    """The ways in which tensors of this run's model are stored; nothing where the packer may choose
    any."""
    if not _stores_plainly(config):
        return {}
    own, layers = config.quantize, config.model.num_layers
    bits = {own.bits_of(name, layers) for name in parameter_table(config.model)}
    bits |= {8} if own.gate_bits else set()
    flat = {"flat8"} if own.control_bits else set()
    kept = {f"int{number}" for number in bits} | flat | {"float16", "float32", "int64"}
    return {"SCHEMES": kept}


def _stores_plainly(config: TrainConfig) -> bool:
    """Whether names of schemes say no more than an entry of the table and how scales are kept."""
    own = config.quantize
    return own.allocate == "off" and own.low_rank == "off" and not own.awq_groups


_ROWS = {"StoreRule", "ParamRule", "scalar", "table"}
"""What makes a row of a table by patterns of names; the pattern comes first."""


def without_idle_rows(tree: ast.Module, config: TrainConfig) -> ast.Module:
    """Tables of patterns without the rows that match nothing in this run's model."""
    names = list(parameter_table(config.model))
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple):
            node.elts = [row for row in node.elts if not _is_idle(row, names)]
    return tree


def _is_idle(row: ast.expr, names: list[str]) -> bool:
    if not (isinstance(row, ast.Call) and isinstance(row.func, ast.Name) and row.args):
        return False
    pattern = row.args[0]
    if row.func.id not in _ROWS or not isinstance(pattern, ast.Constant):
        return False
    return not any(fnmatch.fnmatchcase(name, str(pattern.value)) for name in names)


def stand_ins(config: TrainConfig) -> dict[str, str]:
    """Module or definition -> what it is in the script."""
    fixed = config.with_overrides({"data.dir": "", "source.artifact": ""})
    plain = fixed.with_overrides({"runtime.seed": 1337}).text_without_places()
    other = fixed.with_overrides({"runtime.seed": _SEED}).text_without_places()
    before, after = other.split(str(_SEED))
    find = _STEPPED_SCHEME if config.quantize.scale_bits == 8 else _PLAIN_SCHEME
    named = {"trainer.quantize.schemes.find_scheme": find}
    return (
        _STAND_INS
        | (named if _stores_plainly(config) else {})
        | {
            "trainer.config.train.TrainConfig.text_without_places": (
                "def text_without_places(self):\n"
                " seed = self.runtime.seed\n"
                f" return {plain!r} if seed == 1337 else {before!r} + str(seed) + {after!r}\n"
            ),
        }
    )


_SEED = 987654321
_PLAIN_SCHEME = """
def find_scheme(name) -> Scheme | None:
    return SCHEMES[name]
"""
_STEPPED_SCHEME = """
from dataclasses import replace
def find_scheme(name) -> Scheme | None:
    base, _, step = name.partition("+")
    return replace(SCHEMES[base], has_step=True) if step else SCHEMES[base]
"""
_STAND_INS = {
    "trainer.config.base": """
import copy
PositiveInt = PositiveFloat = Fraction = raise_together = None
class Settings:
    def model_copy(self, update):
        changed = copy.copy(self)
        changed.__dict__.update(update)
        return changed
""",
    "trainer.code": """
from pathlib import Path
def packed_code(config=None):
    return Path(__file__).read_bytes()
""",
    "trainer.report.TrainResult": """
class TrainResult:
    def __init__(self, **fields):
        self.__dict__.update(fields)
    def model_dump(self):
        return self.__dict__
""",
    "trainer.data.manifest": """
import json
from trainer.data.shards import num_tokens
class Manifest:
    def __init__(self, counts, digest):
        self.counts, self.digest = counts, digest
    def num_tokens(self, split):
        return self.counts[split]
def current_manifest(folder, shards, tokenizer, vocab_size, val_bytes=()) -> Manifest:
    path = folder / "dataset.json"
    digest = json.loads(path.read_text())["digest"] if path.is_file() else ""
    counts = {split: sum(map(num_tokens, paths)) for split, paths in shards.items()}
    return Manifest(counts, digest)
""",
    "trainer.artifact._Header": "_Header = None",
    "trainer.artifact._read_header": """
def _read_header(packed_header, text_size) -> tuple[None, TrainConfig]:
    text = CODECS["brotli"].decompress(packed_header, text_size)
    return type("", (), json.loads(text)), TrainConfig()
""",
    "trainer.finish.Finish.adopt": """
def adopt(self, path):
    blob = artifact.read(path)
    size = PackedSize(len(packed_code()), len(blob), artifact.sha256(blob))
    return size, self.work.config
""",
    "trainer.distributed.Group.on_main": """
def on_main(self, work):
    outcome, failure = None, ""
    if self.is_main:
        try:
            outcome = work()
        except TrainerError as error:
            failure = str(error)
    failure = self.broadcast_bytes(failure.encode() if self.is_main else None).decode()
    if failure:
        raise TrainerError(failure)
    return outcome
""",
    "trainer.config.source.SourceConfig.skips_training": """
@property
def skips_training(self):
    return False
""",
    "trainer.script.fixed_config": """
def fixed_config():
    return TrainConfig()
""",
}


def prepared(tree: ast.Module, config: TrainConfig, facts: Facts) -> ast.Module:
    """The merged program with this run's settings as defaults, and tables with what it looks up."""
    keys = kept_keys(config)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = next((_ALIASES[n] for n in _ALIASES if node.id.endswith(n)), node.id)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in facts.objects:
            node.body = [s for s in node.body if getattr(s, "name", "") not in _NOT_CALLED]
            settings = facts.objects[node.name]
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    value = literal(getattr(settings, statement.target.id))
                    statement.value = value or statement.value
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id in keys:
                _keep(node.value, keys[target.id])
    return tree


def _keep(table: ast.expr | None, kept: set[str]) -> None:
    """Leave only these keys of a dictionary, or elements of a tuple."""
    if isinstance(table, ast.Tuple):
        table.elts = [one for one in table.elts if ast.literal_eval(one) in kept]
    elif isinstance(table, ast.Dict):
        pairs = list(zip(table.keys, table.values, strict=True))
        pairs = [(key, value) for key, value in pairs if key and ast.literal_eval(key) in kept]
        table.keys = [key for key, _ in pairs]
        table.values = [value for _, value in pairs]
