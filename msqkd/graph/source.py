"""The source of cells: classes from generated text, and where a network's own code branches.

MindSpore's parser reads the file behind a method.
"""

from __future__ import annotations

import ast
import atexit
import importlib.util
import inspect
import itertools
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

_counter = itertools.count()
_folder: Optional[Path] = None


def load_class(source: str) -> type:
    """The class that `source` defines, imported from a file of its own, which is gone when Python ends."""
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="msqkd_cells_"))
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    name = f"msqkd_cell_{next(_counter)}"
    file = _folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # MindSpore's parser looks the class's module up by name
    spec.loader.exec_module(module)
    return next(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name)


def branching_lines(cells: Mapping[str, Any], path: str) -> str:
    """Where the cell at `path` branches on more than its own attributes: ``net.py:12``, or nothing when unknown."""
    try:
        construct = type(cells[path]).construct
        lines, first = inspect.getsourcelines(construct)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        file = inspect.getsourcefile(construct)
    except (KeyError, OSError, TypeError, SyntaxError):
        return ""
    branches = [node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.While, ast.IfExp))]
    found = sorted(first + node.lineno - 1 for node in branches if _names(node.test) - {"self"})
    return f"{file}:{', '.join(map(str, found[:3]))}" if found else f"{file}:{first}"


def _names(expression: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
