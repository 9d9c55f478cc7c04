"""How far each layout is from one rank, as tables in Markdown, from what the tests of layouts have found.

    python -m pytest tests/distributed/test_layouts.py tests/distributed/test_pipeline.py \\
        tests/distributed/test_triples.py -m "full or not full" --junitxml=layouts.xml
    python benchmarks/equivalence.py layouts.xml > docs/layouts.md

Errors are relative to one rank, in float32: of a step's loss, and the largest of any parameter's gradient.
"""

from __future__ import annotations

import sys
from xml.etree import ElementTree

HEAD = """# What layouts change of the answer

Tiny models of each family in float32 on 4 CPU ranks (gloo; 8 for products of three axes) against one rank without any
parallelism: packs with pictures and sound, without pictures, without media, and empty. Relative error of a step's loss,
and the largest of any parameter's gradient. The tests that wrote this allow 1e-5 and 1e-4; `benchmarks/equivalence.py`
says how it is made anew.
"""
FOOT = """
## Hundreds of ranks, simulated

`tests/device`, cases `vl_235b_of_128` and `vl_235b_of_512`: the start and one step of four packs of one rank of
Qwen3-VL-235B-A22B's shape under pipeline 4 x tensor 4 x expert 8, two layers in each stage, on a device that computes
nothing. On one busy core of a 2-core x86_64 machine (2026-11-29): 13.0 s of processor time with 512 ranks, 12.3 s with
128, libraries included; a rank of each of the four stages in one process 33 s. The only waits are those for the sizes
of the experts' rows. With all 94 layers, 24 to a stage, a rank was not through after 100 s beside other work.
"""
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


def main(path: str) -> None:
    found = read(path)
    of_families = {tuple(name.split("-")): errors for name, errors in found.items() if "-" in name}
    families = list(dict.fromkeys(family for family, _ in of_families))
    layouts = list(dict.fromkeys(layout for _, layout in of_families))
    print(HEAD)
    print("| layout |", " | ".join(families), "|")
    print("|---" * (1 + len(families)) + "|")
    for layout in layouts:
        cells = (of_families.get((family, layout)) for family in families)
        print(f"| {layout} |", " | ".join("refused" if cell is None else tell(cell) for cell in cells), "|")
    print("\nFamilies with experts divide them too, over 2 or 4 ranks. A delta rule's state goes around no ring.\n")
    print("Qwen3-Omni's parts of other sizes (`hybrid`: with Qwen3.5's layers), and ways to hold less:\n")
    print("| case | loss / gradient |\n|---|---|")
    for name, errors in found.items():
        if "-" not in name:
            print(f"| {name} | {tell(errors)} |")
    print(FOOT)


if __name__ == "__main__":
    main(sys.argv[1])
