"""The site: sphinx-build --fail-on-warning -b html docs build/docs (pip install '.[docs]')."""

import jax_fa3

project = "jax_fa3"
version = release = jax_fa3.__version__
# The docstrings are in Google's style, the guides in Markdown.
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
myst_heading_anchors = 3  # headings down to ### can be linked to, as on GitHub
default_role = "code"
autodoc_typehints = "none"  # the texts give shapes and dtypes
autodoc_preserve_defaults = True
html_theme = "alabaster"
html_show_copyright = False
