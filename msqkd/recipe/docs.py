"""The reference page of recipes, rendered from the models: ``python -m msqkd.recipe.docs > docs/recipe.md``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from msqkd.recipe.problems import Allowed, allowed, section_of, show
from msqkd.recipe.schema import Recipe

_INTRODUCTION = """\
# The recipe

A recipe is one YAML file that says everything about a run: the network, the data, what is quantised and how, the
training, and what is exported. The smallest one is

```yaml
apiversion: msqkd/v1
name: my_lenet
model:
  name: lenet5
  checkpoint: lenet5.ckpt
data:
  name: digits
```

**Which recipe.** A recipe is given as a file, or by the name of one that comes with msqkd (`msqkd recipes` lists them).

**Changing a key for one run.** `--set key.path=value`, as often as needed; the value is YAML, an entry of a list is
given by its number: `--set train.epoch_size=3`, `--set data.root=/data/cifar10`,
`--set quantization.rules.0.weight.bits=4`. A later one wins. `--set key.path=null` brings the default back.

**null and {}.** Everywhere, `null` takes the default. A section that is `null` by default is absent
(`distillation: null` is a run without distillation), and `{}` is the section with all its defaults. A key with nothing
after the colon is refused.

**File names.** A relative name is looked for in the working directory first, then in the recipe's folder.

**Numbers and words.** A recipe is YAML 1.2: booleans are `true` and `false`, octal numbers begin with `0o`. What
YAML 1.1 reads otherwise (`010`, `1:30`, `1_000`, `yes`, `on`) is a text. It is refused where a number, a boolean or a
free value is expected; in `args`, put a text of that form in quotes.

**What is refused.** Unknown keys, keys given twice, wrong types (a text for a number, `true` for 1), values out of
range, YAML merge keys (`<<`), and every setting that could have no effect beside the others. All problems of a file
are reported at once, each with its line:

```text
my_lenet.yaml:9: train.epoch_sise: unknown key 'epoch_sise', allowed in train: epoch_size, …; did you mean 'epoch_size'?
--set train.lr=-1: found -1, allowed: a number above 0
```

**Where the trained model comes from.** Exactly one of `model.checkpoint`, a `pretrain` section, and
`model.args: {pretrained: true}` with `source: mindcv`.
"""


def schema_markdown() -> str:
    """The whole page as Markdown: an introduction, then one table a section with every key, value and default."""
    sections: list[tuple[str, type[BaseModel]]] = [("", Recipe), *_sections("", Recipe)]
    home = {model: path for path, model in sections}  # of a model used twice, the last place has the table
    parts = [_INTRODUCTION]
    for path, model in sections:
        parts.append(f"## {path or 'The top level'}\n")
        if home[model] == path:
            parts += [f"{(model.__doc__ or '').strip()}\n", _table(model)]
        else:
            parts.append(f"The same keys as [{home[model]}](#{re.sub('[^a-z0-9_-]', '', home[model])}).\n")
    return "\n".join(parts)


def _sections(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections below `model`, each before its own sub-sections, with their key paths."""
    for key, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            here = f"{path}.{key}".lstrip(".") + ("[]" if field.default == [] else "")
            yield here, section
            yield from _sections(here, section)


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        cells = (f"`{key}`", _allowed(field), _default(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _allowed(field: FieldInfo) -> str:
    if section_of(field.annotation) is not None and not any(isinstance(note, Allowed) for note in field.metadata):
        return "a list of sections" if field.default == [] else "a section"
    return allowed(field.annotation, field.metadata).replace("'", "`")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    if field.default in ({}, ""):
        return "`{}`" if field.default == {} else "empty"
    return f"`{show(field.default)}`".replace("'", "")


if __name__ == "__main__":
    print(schema_markdown(), end="")
