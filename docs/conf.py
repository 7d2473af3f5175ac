"""Settings of Sphinx: `sphinx-build -W docs docs/_build`, which runs the gallery."""

import sktransfer

project = "sktransfer"
copyright = "2026, the sktransfer developers"
release = version = sktransfer.__version__
extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Pretrained image networks as scikit-learn estimators",
    "fixed_sidebar": True,
    "page_width": "1080px",
}
html_show_sourcelink = False
myst_heading_anchors = 2
numpydoc_show_class_members = False
autodoc_typehints = "none"  # the docstrings say more
default_role = "code"
smartquotes = False
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "auto_examples",
    "within_subsection_order": "FileNameSortKey",
    "capture_repr": ("_repr_html_",),  # data frames; the rest is printed
    "download_all_examples": False,
    "image_srcset": ["2x"],
    "min_reported_time": 3600,  # seconds depend on the machine
    "show_signature": False,
    "write_computation_times": False,
}
