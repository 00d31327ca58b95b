"""Write the held-out natural text, one document a line, so that evaluation needs no particular Python.

python data/training/write_heldout.py
"""

from __future__ import annotations

import json
import os

from corpus import documents, held_out

from ib_analysis.model.bundled import HELD_OUT


def main() -> None:
    partial = HELD_OUT.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for module, text in documents():
            if held_out(module):
                file.write(json.dumps({"module": module, "text": text}, ensure_ascii=False) + "\n")
    os.replace(partial, HELD_OUT)


if __name__ == "__main__":
    main()
