"""How far each layout is from one rank: the tables of docs/layouts.md, from what the tests of layouts have found.

    python -m pytest tests/distributed/test_layouts.py tests/distributed/test_pipeline.py \\
        tests/distributed/test_triples.py -m "full or not full" --junitxml=layouts.xml
    python benchmarks/equivalence.py layouts.xml  # or several

Errors are relative to one rank, in float32: of a step's loss, and the largest of any parameter's gradient.
"""

from __future__ import annotations

import sys
from xml.etree import ElementTree

Errors = tuple[float, float]


def read(path: str) -> dict[str, Errors]:
    """Errors of loss and gradient, by the name of the case."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        noted = {each.get("name"): float(each.get("value") or "nan") for each in case.iter("property")}
        if "gradient error" in noted:
            name = (case.get("name") or "").partition("[")[2].removesuffix("]")
            found[name] = noted["loss error"], noted["gradient error"]
    return found


def tell(errors: Errors) -> str:
    return " / ".join(f"{error:.0e}" for error in errors)


def main(paths: list[str]) -> None:
    found = {name: errors for path in paths for name, errors in read(path).items()}
    of_families = {tuple(name.split("-")): errors for name, errors in found.items() if "-" in name}
    families = list(dict.fromkeys(family for family, _ in of_families))
    layouts = list(dict.fromkeys(layout for _, layout in of_families))
    print("| layout |", " | ".join(families), "|")
    print("|---" * (1 + len(families)) + "|")
    for layout in layouts:
        cells = (of_families.get((family, layout)) for family in families)
        print(f"| {layout} |", " | ".join("refused" if cell is None else tell(cell) for cell in cells), "|")
    print("\n| case | loss / gradient |\n|---|---|")
    for name, errors in found.items():
        if "-" not in name:
            print(f"| {name} | {tell(errors)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
