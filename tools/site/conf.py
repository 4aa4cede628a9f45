"""What Sphinx needs to know of the site. `make site` runs it over the pages that tools/site/pages.py has laid out."""

project = "miniKMS"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "miniKMS"
html_show_copyright = html_show_sphinx = False
html_show_search_summary = False  # a summary is fetched, which a page opened from a file may not do
html_copy_source = False
smartquotes = False  # two hyphens would become a dash
myst_heading_anchors = 6
html_static_path = ["static"]
html_css_files = ["site.css"]
