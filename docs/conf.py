"""How Sphinx builds the documentation: python -m sphinx -W docs build/docs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from neo_jax import __version__

project = "neo_jax"
author = copyright = "the authors of neo_jax"
version = release = __version__
extensions = [
    "myst_nb",  # Markdown, and notebooks with the outputs they were stored with
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "sphinx_book_theme"
html_title = "neo_jax"
html_theme_options = {
    "repository_url": "https://github.com/neo-jax/neo_jax",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_edit_page_button": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "show_toc_level": 2,
}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"
default_role = "code"  # `names` in docstrings
napoleon_use_ivar = True  # attributes of a class are no members of their own
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False
copybutton_exclude = ".linenos, .gp, .go"
