"""Sphinx: `nox -s docs` builds the site into docs/_build/html, and any warning fails it."""

import alter

project = "ALTER"
version = release = alter.__version__
copyright = "the ALTER developers, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ALTER {version}"
html_theme_options = {"source_repository": ""}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_prompt_text = "$ "  # what is copied from a console block is its commands alone
copybutton_only_copy_prompt_lines = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autoclass_content = "class"
napoleon_numpy_docstring = False
