"""Links to the public names, and the directive `public`: autodoc of the names of a module.

    ```{public} fastdistill
    linear_topk linear_logprobs_at linear_lse_gather
    ```

Without a list of names it documents the whole of the module's `__all__`. Wherever a name of
`fastdistill.__all__` is written as code, it links to its documentation.
"""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from importlib import import_module
from typing import Any, ClassVar

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import fastdistill
from fastdistill import DistillConfig


class Public(SphinxDirective):
    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        (module_name,) = self.arguments
        module = import_module(module_name)
        names = " ".join(self.content).split() or module.__all__
        blocks = [_autodoc(module_name, name, getattr(module, name)) for name in names]
        text = "```{eval-rst}\n" + "\n".join(blocks) + "\n```\n"
        return self.parse_text_to_nodes(text)


def _autodoc(module: str, name: str, value: Any) -> str:
    """Return the autodoc directive of one public name."""
    if inspect.ismodule(value):
        return f".. automodule:: {module}.{name}\n"
    if not inspect.isclass(value):
        return f".. autofunction:: {module}.{name}\n"
    return f".. autoclass:: {module}.{name}\n   :members:\n   :exclude-members: __init__, __new__\n"


class ConfigFields(SphinxDirective):
    """The directive `config-fields`: a table of the fields of DistillConfig with their defaults."""

    def run(self) -> list[nodes.Node]:
        own = DistillConfig.__annotations__
        rows = [
            f"| `{field.name}` | `{_plain(field.type)}` | `{_default(field)}` |"
            for field in fields(DistillConfig)
            if field.name in own
        ]
        return self.parse_text_to_nodes(
            "| field | type | default |\n|---|---|---|\n" + "\n".join(rows)
        )


def _plain(annotation: Any) -> str:
    return str(annotation).replace(" | ", " or ")


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return repr(field.default)
    return getattr(field.default_factory, "__name__", "") + "()"


def _readable(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str | None, Any]:
    """Change two signatures: the hundred fields of TrainingArguments, and what is no Python."""
    if name == "fastdistill.DistillConfig":
        signature = "(output_dir, **fields)"
    return signature and signature.replace("<factory>", "..."), returns


def _link_names(app: Sphinx, doctree: nodes.document) -> None:
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext()
        inside = literal.parent
        if name in fastdistill.__all__ and not isinstance(inside, (nodes.title, nodes.reference)):
            link = pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=f"fastdistill.{name}",
                refexplicit=True,
                refdoc=app.env.docname,
            )
            link.append(literal.deepcopy())
            literal.replace_self(link)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", _link_names)
    app.connect("autodoc-process-signature", _readable)
    app.add_directive("config-fields", ConfigFields)
    app.add_directive("public", Public)
    return {"parallel_read_safe": True}
