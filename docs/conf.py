"""The API page: sphinx-build --fail-on-warning -b html docs build/docs (pip install '.[docs]')."""

import jax_fa3

project = "jax_fa3"
version = release = jax_fa3.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]  # the docstrings are in Google's style
default_role = "code"
autodoc_typehints = "none"  # the texts give shapes and dtypes
autodoc_preserve_defaults = True
html_theme = "alabaster"
html_show_copyright = False
