"""Functions that have one value wherever the program looks at them."""

from __future__ import annotations

import ast

from trainer.flatten.syntax import returned_literal

Literal = str | int | float | bool | bytes | None


def constant_functions(tree: ast.Module) -> dict[str, ast.expr]:
    """Functions at the top that do nothing but return a literal."""
    return {
        node.name: returned
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.decorator_list
        and (returned := returned_literal(node)) is not None
    }
