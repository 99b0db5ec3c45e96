from pathlib import Path

from pipeline.perf.table_rerun import measure_table_rerun


def test_inserted_rows_are_added_and_all_others_unchanged(tmp_path: Path) -> None:
    unchanged, inserted, alone = measure_table_rerun(700, 20, tmp_path)
    assert (unchanged.num_unchanged, unchanged.num_added) == (700, 0)
    assert (inserted.num_unchanged, inserted.num_added) == (700, 20)
    assert (alone.num_unchanged, alone.num_added) == (0, 20)
    assert min(run.processor_seconds for run in (unchanged, inserted, alone)) > 0
