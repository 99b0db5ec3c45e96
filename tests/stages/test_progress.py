import io

import pytest
from rich.console import Console

from pipeline.stages import progress
from pipeline.stages.progress import StageProgress


def test_a_log_tells_how_long_each_phase_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    now, output = 100.0, io.StringIO()
    console = Console(file=output, width=100, markup=False, get_time=lambda: now)
    with StageProgress(console, "finetune") as shown:
        for phase, pace in (("finetune", 2.0), ("blind", 30.0)):
            for done in range(1, 5):
                shown.update(done, 4, f"loss {done} [mlm]", phase=phase)
                now += pace
    lines = output.getvalue().splitlines()
    assert lines[2] == "finetune: 3/4  loss 3 [mlm]  left 0:00:02"
    assert lines[3] == "finetune: 4/4  loss 4 [mlm]  left 0:00:00"
    assert lines[6] == "blind: 3/4  loss 3 [mlm]  left 0:00:30"
