"""Classes from generated source: MindSpore's parser reads the file behind a method."""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Optional

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
