"""Where the package under test lies, for the interpreters that tests start."""

from __future__ import annotations

from pathlib import Path

import smolrun

# After `pip install .` this is not the source tree, which then has no extension module.
SOURCE = Path(smolrun.__file__).resolve().parents[1]
