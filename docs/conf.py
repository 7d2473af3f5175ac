"""Settings of Sphinx: `sphinx-build -W docs docs/_build`, which runs the gallery."""

import os
import sys

import sktransfer

sys.path.insert(0, os.path.dirname(__file__))  # charts, command_line
os.environ["COLUMNS"] = "72"  # of the usage of commands
project = "sktransfer"
copyright = "2026, the sktransfer developers"
release = version = sktransfer.__version__
extensions = [
    "charts",
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.autoprogram",
]
exclude_patterns = ["_build", "_templates", "examples"]
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme = "pydata_sphinx_theme"
html_title = "sktransfer"
html_theme_options = {
    "logo": {"text": "sktransfer"},
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    "navbar_persistent": ["search-button"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
_PAGES = ("guide", "export", "results", "results/*", "scale_out", "security", "contributing")
html_sidebars = {page: [] for page in _PAGES}  # wide ones
html_show_sourcelink = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 2
autosummary_generate = True
toc_object_entries_show_parents = "hide"
numpydoc_show_class_members = False
autodoc_typehints = "none"  # the docstrings say more
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"
default_role = "code"
smartquotes = False
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "auto_examples",
    "within_subsection_order": "FileNameSortKey",
    "capture_repr": ("_repr_html_",),  # data frames; the rest is printed
    "backreferences_dir": "generated/backreferences",
    "doc_module": ("sktransfer",),
    "download_all_examples": False,
    "image_srcset": ["2x"],
    "min_reported_time": 0,  # each page says what it took
    "show_signature": False,
    "write_computation_times": False,
}
