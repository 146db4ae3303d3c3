"""Everything is in pyproject.toml, except for the long description: the README without links into the repository.

Package indexes and installed packages have none of the files that the README shows and links.
"""

import re
from pathlib import Path

from setuptools import setup

text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
text = re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)
setup(long_description=text, long_description_content_type="text/markdown")
