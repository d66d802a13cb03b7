"Sphinx, as tools/build_docs.py calls it on the pages it has laid out."
import re
from pathlib import Path

import geoforecast

project, author, release = "geoforecast", "The geoforecast contributors", geoforecast.__version__
copyright = author
extensions = ["myst_nb", "sphinx_design"]
exclude_patterns = ["conf.py"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {f"assets/{name}": {} for name in ("require.js", "../widgets.js", "embed-amd.js")}
mathjax_path = "assets/mathjax.js"

add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = "geoforecast"
html_static_path = ["_static"]
html_favicon = "_static/logo.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"image_light": "_static/logo.svg", "image_dark": "_static/logo.svg", "text": "geoforecast", "alt_text": "geoforecast, front page"},
    "navbar_align": "left",
    "show_prev_next": True,
    "header_links_before_dropdown": 8,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {name: [] for name in ("index", "gallery")}
