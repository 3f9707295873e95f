"""Every decimal in a table of README.md and base/README.md is a number of the files that it cites.

A row cites the files it names, else those of the paragraph above its table; what is printed in a code block,
those of the paragraphs around it. A rate may be printed in percent. Counts without a point are not checked.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE = r"results/[\w*./-]+\.json"
DECIMAL = r"(?<![\w.])\d+\.\d+"


def numbers(record) -> list[float]:
    """All numbers in a JSON value, and the means of its lists of 3 to 10 (seeds)."""
    if isinstance(record, dict | list):
        inside = record.values() if isinstance(record, dict) else record
        found = [x for value in inside for x in numbers(value)]
        return found + (
            [sum(found) / len(found)] if isinstance(record, list) and 3 <= len(found) <= 10 else []
        )
    return [float(record)] if isinstance(record, int | float) else []


def claims(text: str) -> list[tuple[str, list[str]]]:
    """(table row or code block with decimals, the files it cites) of a page."""
    found, blocks = [], re.split(r"\n\s*\n", text)
    for above, block, below in zip(["", *blocks], blocks, [*blocks[1:], ""], strict=False):
        around = re.findall(FILE, above)
        if block.startswith("|"):
            found += [(row, re.findall(FILE, row) or around) for row in block.splitlines()]
        elif block.startswith("```"):
            found += [(block, around + re.findall(FILE, below))]
    return [(claim, files) for claim, files in found if files and re.search(DECIMAL, claim)]


def wrong(claim: str, files: list[str]) -> list[str]:
    """The decimals of a claim that are no rounding of any number in its files."""
    paths = [path for pattern in files for path in sorted(ROOT.glob(pattern))]
    known = [abs(x) for path in paths for x in numbers(json.loads(path.read_text()))]
    known += [100 * x for x in known if x <= 1]
    plain = re.sub("`[^`]*`" if claim.startswith("|") else "```", "", claim)
    found = re.findall(DECIMAL, plain)
    half = {text: 0.5001 * 10 ** -len(text.partition(".")[2]) for text in found}
    return [text for text in found if not any(abs(x - float(text)) <= half[text] for x in known)]


CLAIMS = [c for page in ("README.md", "base/README.md") for c in claims((ROOT / page).read_text())]


@pytest.mark.parametrize(("claim", "files"), CLAIMS, ids=lambda c: c[:40] if isinstance(c, str) else "")
def test_every_decimal_of_a_table_is_in_the_results_it_cites(claim, files):
    assert all(list(ROOT.glob(pattern)) for pattern in files), f"no such file: {files}"
    assert wrong(claim, files) == []


def test_most_result_tables_cite_their_files_and_a_wrong_number_is_found():
    assert len(CLAIMS) > 20
    claim, files = next((c, f) for c, f in CLAIMS if c.startswith("| demo, dev | random"))
    assert wrong(claim.replace("2.9", "3.1"), files) == ["3.1"]
    assert wrong("| 1.0 |", files) == ["1.0"] and wrong("| `1.0` |", files) == []
