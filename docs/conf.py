"""Settings of Sphinx: `sphinx-build -W docs docs/_build`."""

import sktransfer

project = "sktransfer"
copyright = "2026, the sktransfer developers"
release = version = sktransfer.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Pretrained image networks as scikit-learn estimators"}
myst_heading_anchors = 2
numpydoc_show_class_members = False
autodoc_typehints = "none"  # the docstrings say more
default_role = "code"
smartquotes = False
