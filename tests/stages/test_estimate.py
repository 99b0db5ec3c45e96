"""What a check has found, as it is told."""

from dataclasses import replace

from rich.console import Console

from pipeline.stages.estimate import Data, Machine, Measured, Phase, Report

GB = 10**9
PHASE = Phase(
    name="pretrain",
    steps=1800,
    samples_per_step=8,
    accumulation_steps=2,
    zero_stage=1,
    precision="bf16",
    parameters=7000,
    trained_parameters=5000,
    state_bytes={"0": 16 * GB, "1": 10 * GB, "2": 8 * GB, "3": None},
    offloaded_bytes=0,
    swapped_bytes=0,
    checkpoint_bytes=3 * GB,
    activation_bytes=2 * GB,
    data=Data(samples=40, shards=3, examples={"captions": 200}, epochs={"captions": 72.0}),
    measured=Measured(2.0, data_wait_fraction=0.25, tokens_per_sample=20, checkpoint_seconds=1.5),
)


def report(*phases: Phase, bytes_per_rank: int | None = 12 * GB) -> Report:
    machine = Machine("cuda", "a GPU", bytes_per_rank, workers=4)
    return Report("small", machine, phases, ("the disk's room",), ("use fewer workers",))


def shown(found: Report) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        found.print(console)
    return capture.get()


def test_a_phase_takes_its_steps_and_a_device_holds_state_and_activations() -> None:
    assert PHASE.hours == 1.0
    assert replace(PHASE, measured=None).hours is None
    assert [PHASE.bytes_at(stage) for stage in range(4)] == [18 * GB, 12 * GB, 10 * GB, None]
    assert replace(PHASE, activation_bytes=None).bytes_at(1) == 10 * GB


def test_the_recipes_stage_is_marked_among_those_that_fit_and_do_not() -> None:
    lines = shown(report(PHASE)).splitlines()
    rows = {line.split("│")[1].strip(): line.split("│") for line in lines if line.startswith("│")}
    fits = {name: cells[-2].strip() for name, cells in rows.items()}
    assert fits == {"0": "no", "1 ← the recipe's": "yes", "2": "yes", "3": ""}
    assert "not in bf16" in rows["3"][2]
    unknown = shown(report(PHASE, bytes_per_rank=None)).splitlines()
    assert [line.split("│")[-2].strip() for line in unknown if line.startswith("│ 0")] == ["?"]


def test_the_whole_time_is_told_only_if_that_of_every_phase_is_known() -> None:
    assert "takes about 2.0 hours" in shown(report(PHASE, PHASE))
    assert "takes about" not in shown(report(PHASE, replace(PHASE, measured=None)))


def test_all_that_was_found_is_shown_and_written() -> None:
    text = shown(report(PHASE))
    for said in (
        "7,000 parameters, 2,000 of them frozen",
        "40 samples in 3 shards: 200 captions (72 epochs)",
        "1,800 steps of 8 samples, 2 micro-batches a rank: 288,000 tokens and regions",
        "2,000 ms a step (25% waiting for data), 1.5 s to write a checkpoint beside: 1.0 hours",
        "Unknown: the disk's room",
        "Note: use fewer workers",
    ):
        assert said in text
    (phase,) = report(PHASE).to_json()["phases"]
    assert (phase["hours"], phase["data"]["shards"]) == (1.0, 3)
