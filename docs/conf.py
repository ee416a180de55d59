"""Settings of the documentation: `make docs` writes it to docs/_build/html, without a network."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from fastdistill import __version__

project = "fastdistill"
author = copyright = "The fastdistill authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_help",
    "mathml",
    "plain_docstrings",
    "public_api",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"fastdistill {version}"

myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

default_role = "literal"
add_module_names = False
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

napoleon_custom_sections = [("Returns", "notes_style"), ("Raises", "notes_style")]

# Names in signatures that have no page here: other libraries and types that are not public. Set
# FASTDISTILL_DOCS_LINKS=1 to link to the pages of other libraries; that needs a network.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|matplotlib|numpy|pathlib|random|torch|transformers)\..*"),
    ("py:.*", r"fastdistill\.(alignment|hf|quant|teachers|training)\..*"),
    (
        "py:.*",
        r"(Divergence|HiddenStates|Logits|LossConfig|Module|Path|PositionLoss|PreTrainedModel|ProcessGroup|Tensor)",
    ),
]
if os.environ.get("FASTDISTILL_DOCS_LINKS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
    }
