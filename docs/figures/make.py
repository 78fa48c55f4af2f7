"""Makes the figures of the pages again: `python docs/figures/make.py`.

A figure is a file that the code of its page writes. So this runs the code of every page with figures in an empty
folder, and keeps the files that the page shows.
"""

import os
import pathlib
import re
import shutil
import tempfile

FIGURES = pathlib.Path(__file__).resolve().parent


def main() -> None:
    for page in sorted(FIGURES.parent.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        shown = re.findall(r"^!\[.*?\]\((?:\.\./)*figures/(.*?)\)$", text, flags=re.M)
        if not shown:
            continue
        names: dict[str, object] = {}
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S):
                exec(compile(block, str(page), "exec"), names)
            for name in shown:
                shutil.copy(name, FIGURES / name)
                print(f"{page.name}: {name}")
            os.chdir(FIGURES)


if __name__ == "__main__":
    main()
