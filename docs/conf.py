"""Sphinx configuration. No page loads anything from another host."""

from importlib import metadata

project = "lightning-twa"
author = "The lightning-twa developers"
copyright = f"2026, {author}"
release = metadata.version("lightning-twa")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_results"]
html_theme = "furo"
html_title = f"lightning-twa {release}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
