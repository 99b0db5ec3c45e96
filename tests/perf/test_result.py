"""What is shown of measured figures."""

import io
import json

from rich.console import Console

from pipeline.perf.measure import Times
from pipeline.perf.result import Comparison, Result


def make_result() -> Result:
    times = Times({"theirs": (0.4, 0.6), "ours": (0.125, 0.275)})
    comparison = Comparison.of(
        "a race",
        times,
        columns={"tokens/s": {"ours": "1,234"}},
        notes=["both arrived", "for more: pip install sightline[bench]"],
    )
    return Result("race", {"rounds": 2, "threads": None}, {"cpus": 3}, [comparison])


def test_everyone_is_compared_with_the_first() -> None:
    (comparison,) = make_result().comparisons
    assert comparison.seconds == {"theirs": 0.5, "ours": 0.2}
    assert comparison.ratios == {"theirs": 1.0, "ours": 2.5}


def test_the_table_shows_times_ratios_and_notes() -> None:
    page = io.StringIO()
    (comparison,) = make_result().comparisons
    comparison.print(Console(file=page, width=80, markup=False))
    for part in ("a race", "500.0", "200.0", "2.50", "1,234", "both arrived", "sightline[bench]"):
        assert part in page.getvalue()


def test_a_line_says_how_it_was_measured_and_leaves_out_what_was_not_set() -> None:
    assert make_result().made_with() == "rounds 2, cpus 3"


def test_json_holds_the_same_figures() -> None:
    document = json.loads(json.dumps(make_result().to_json()))
    assert document["bench"] == "race"
    assert document["comparisons"][0]["seconds"]["ours"] == 0.2
