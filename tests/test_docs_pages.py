"""The site's pages read as the Markdown files do on GitHub."""

from __future__ import annotations

import importlib.util

from tests.commands import ROOT

specification = importlib.util.spec_from_file_location("docs_pages", ROOT / "scripts" / "docs_pages.py")
assert specification is not None
assert specification.loader is not None
docs_pages = importlib.util.module_from_spec(specification)
specification.loader.exec_module(docs_pages)


def test_lists_and_tables_are_set_off_from_the_text_before_them_and_nothing_else_changes():
    written = """# Title
Text:
- one
  goes on
- two
| a |
|---|

```
- not a list
| nor a table |
```
1. first
2. second

Text - with a dash
"""
    wanted = """# Title
Text:

- one
  goes on
- two

| a |
|---|

```
- not a list
| nor a table |
```

1. first
2. second

Text - with a dash
"""
    assert docs_pages.set_off(written) == wanted
    assert docs_pages.set_off(wanted) == wanted
