"""The directive `public`: autodoc of the public names of a module.

    ```{public} fastdistill
    linear_topk linear_lse_gather
    ```

Without a list of names it documents the whole of the module's `__all__`.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


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


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("public", Public)
    return {"parallel_read_safe": True}
