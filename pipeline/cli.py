"""The verbs of the command line.

Progress goes to stderr, results to stdout. The exit status is 0 only if all of the work was
done: 1 for a failure, 2 for a wrong command line, 64 for a refused recipe, 70 for a run folder that
was lost to another process, 75 for one in which another command is at work, 130 after Ctrl-C, 143
for training that SIGTERM or Ctrl-C told to stop, and that left a checkpoint to go on from.
"""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Literal, ParamSpec

import typer
from rich.console import Console
from rich.table import Column, Table

from pipeline import __version__
from pipeline.errors import BusyError, ConfigError, LostError, PipelineError, StoppedError

if TYPE_CHECKING:
    from pipeline.stages.submit import JobClient

REFUSED_STATUS = 64
LOST_STATUS = 70
BUSY_STATUS = 75
INTERRUPTED_STATUS = 130
STOPPED_STATUS = 143

# What is told holds paths, keys and reasons of others: a bracket in them is a bracket, not markup.
console = Console(stderr=True, markup=False)

app = typer.Typer(
    name="sightline",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""From image–text files to a trained, evaluated vision–language model, by one recipe.

Start with `sightline run jobs/recipes/quickstart.yaml`: it needs no download and no GPU.
""",
)
data_app = typer.Typer(
    no_args_is_help=True,
    help="Look at a dataset and look after it: info, rejects, preview, diff, verify, compact.",
)
job_app = typer.Typer(no_args_is_help=True, help="Look after submitted jobs: status, logs, stop.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure side by side, in one run.")
app.add_typer(data_app, name="data")
app.add_typer(job_app, name="job")
app.add_typer(bench_app, name="bench")

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe: YAML, path or URL.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]…",
        help="Overrides by dotted key, as `training.finetune.optimizer.learning_rate=1e-4`.",
    ),
]
PrintRecipe = Annotated[
    bool, typer.Option("--print-recipe", help="Print the resolved recipe and do nothing.")
]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain", help="With --print-recipe: what each key means and may be, as comments."
    ),
]
FromCheckpoint = Annotated[
    bool,
    typer.Option(
        "--from-checkpoint",
        help="Go on from the newest checkpoint though settings have changed (steps, rate, …).",
    ),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Train anew what was begun with other settings; the old folder is moved aside.",
    ),
]
Decision = Literal["refuse", "continue", "restart"]
AllowRemovals = Annotated[
    bool,
    typer.Option(
        "--allow-removals",
        help="Let any number of samples go that the source has no more, for this once.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]
Address = Annotated[
    str,
    typer.Option(help="The cluster's dashboard URL.", envvar="RAY_API_SERVER_ADDRESS"),
]
Version = Annotated[
    int | None, typer.Option("--version", help="A version of the manifest; default: the newest.")
]
DatasetUrl = Annotated[str, typer.Argument(metavar="DATASET", help="A dataset: folder or URL.")]
LOCAL_CLUSTER = "http://127.0.0.1:8265"

P = ParamSpec("P")


def main() -> None:
    """The `sightline` command."""
    sys.exit(run_job(sys.argv[1:]))


def run_job(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit status."""
    try:
        app(list(arguments))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def reported(verb: Callable[P, int | None]) -> Callable[P, None]:
    """Turns what a verb returns or raises into an exit status, and an error into a sentence."""

    @wraps(verb)
    def report(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            status = verb(*args, **kwargs)
        except ConfigError as error:
            console.print(f"Refused: {error}", style="red", soft_wrap=True)
            raise typer.Exit(REFUSED_STATUS) from None
        except StoppedError as error:
            console.print(f"Stopped: {error}", soft_wrap=True)
            raise typer.Exit(STOPPED_STATUS) from None
        except PipelineError as error:
            console.print(f"Failed: {error}", style="red", soft_wrap=True)
            statuses: dict[type[PipelineError], int] = {
                BusyError: BUSY_STATUS,
                LostError: LOST_STATUS,
            }
            raise typer.Exit(statuses.get(type(error), 1)) from None
        except KeyboardInterrupt:
            console.print("Stopped. The same command goes on where this one was.")
            raise typer.Exit(INTERRUPTED_STATUS) from None
        raise typer.Exit(status or 0)

    return report


STAGE_VERBS = {
    "run": """Run every stage that is out of date, in order.

    ingest, extract, pretrain, finetune, evaluate, report. Running it again continues what was
    interrupted and skips what is up to date.""",
    "ingest": "Write the source's images and texts into shards; only what changed.",
    "extract": "Compute visual features of the samples that have none from this extractor.",
    "pretrain": "Train on the pretraining objectives; goes on from the newest checkpoint.",
    "finetune": "Fine-tune on the benchmarks, and train the blind twin where asked for.",
    "evaluate": "Score the model on the held-out split with the benchmarks' official metrics.",
}


def _add_stage_verb(name: str, description: str) -> None:
    @reported
    def verb(
        recipe: RecipePath,
        overrides: Overrides = None,
        print_recipe: PrintRecipe = False,
        explain: Explain = False,
        as_json: AsJson = False,
    ) -> None:
        _run_stages(name, recipe, overrides or [], _printed(print_recipe, explain), as_json)

    @reported
    def ingest(
        recipe: RecipePath,
        overrides: Overrides = None,
        allow_removals: AllowRemovals = False,
        print_recipe: PrintRecipe = False,
        explain: Explain = False,
        as_json: AsJson = False,
    ) -> None:
        printed = _printed(print_recipe, explain)
        _run_stages(name, recipe, overrides or [], printed, as_json, allow_removals=allow_removals)

    @reported
    def train(
        recipe: RecipePath,
        overrides: Overrides = None,
        from_checkpoint: FromCheckpoint = False,
        restart: Restart = False,
        print_recipe: PrintRecipe = False,
        explain: Explain = False,
        as_json: AsJson = False,
    ) -> None:
        decision, printed = _decision(from_checkpoint, restart), _printed(print_recipe, explain)
        _run_stages(name, recipe, overrides or [], printed, as_json, decision)

    @reported
    def run(
        recipe: RecipePath,
        overrides: Overrides = None,
        from_checkpoint: FromCheckpoint = False,
        restart: Restart = False,
        allow_removals: AllowRemovals = False,
        print_recipe: PrintRecipe = False,
        explain: Explain = False,
        as_json: AsJson = False,
    ) -> None:
        decision, printed = _decision(from_checkpoint, restart), _printed(print_recipe, explain)
        _run_stages(name, recipe, overrides or [], printed, as_json, decision, allow_removals)

    of_its_own: dict[str, Callable[..., None]] = {
        "run": run,
        "ingest": ingest,
        "pretrain": train,
        "finetune": train,
    }
    app.command(name, help=description)(of_its_own.get(name, verb))


def _decision(from_checkpoint: bool, restart: bool) -> Decision:
    if from_checkpoint and restart:
        raise ConfigError(
            "--from-checkpoint goes on from what is there and --restart does not: give one of them"
        )
    return "continue" if from_checkpoint else "restart" if restart else "refuse"


def _printed(print_recipe: bool, explain: bool) -> Literal["no", "plain", "explained"]:
    if explain and not print_recipe:
        raise ConfigError("--explain says what --print-recipe prints: give both")
    return "explained" if explain else "plain" if print_recipe else "no"


def _run_stages(
    name: str,
    recipe: str,
    overrides: Sequence[str],
    printed: Literal["no", "plain", "explained"],
    as_json: bool,
    decision: Decision = "refuse",
    allow_removals: bool = False,
) -> None:
    from pipeline import config
    from pipeline.recipe import load

    resolved = load(recipe, overrides)
    if printed == "explained":
        from pipeline.reference import explained

        typer.echo(explained(resolved), nl=False)
    if printed == "plain":
        typer.echo(config.to_yaml(resolved), nl=False)
    if printed != "no":
        return
    from pipeline.stages.changed import OnChange
    from pipeline.stages.run import STAGES, run_stages
    from pipeline.stages.submit import COMMAND

    # A job knows its recipe by another name than the user who submitted it.
    command = os.environ.get(COMMAND) or shlex.join(["sightline", name, recipe, *overrides])
    names = list(STAGES) if name == "run" else [name]
    on_change = OnChange(decision, command)
    summary = run_stages(resolved, names, console, on_change, allow_removals)
    if as_json:
        typer.echo(json.dumps(summary, ensure_ascii=False))


for _name, _description in STAGE_VERBS.items():
    _add_stage_verb(_name, _description)


@app.command()
@reported
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run: folder or URL.")],
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page: curves, metrics, pictures, attention."""
    from pipeline.report.run_report import write_report

    location = write_report(run)
    typer.echo(json.dumps({"report": location}) if as_json else location)


@app.command()
@reported
def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run or a model folder.")],
    image: Annotated[str, typer.Option(help="A photograph: path or URL.")],
    question: Annotated[
        str | None, typer.Option(help="Ask this; without it the image is captioned.")
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(help="Write with so many beams; default: as the model was scored.", min=1),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Caption a photograph, or answer a question about it.

    A caption is written as the model's were when it was scored. What should be known before the
    text is believed goes to stderr.
    """
    from pipeline.stages.predict import predict as predict_image

    prediction = predict_image(model, image, question, beams)
    for note in prediction["notes"]:
        console.print(f"Note: {note}", style="yellow", highlight=False, soft_wrap=True)
    if "decoding" in prediction:
        told = ", ".join(f"{name} {value}" for name, value in prediction["decoding"].items())
        console.print(f"written with {told}", highlight=False, soft_wrap=True)
    typer.echo(json.dumps(prediction, ensure_ascii=False) if as_json else prediction["text"])


@app.command()
@reported
def check(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Tell what a run will take before it starts: bytes per rank, epochs, hours.

    Where the dataset and its features are there, a few real steps of each phase are timed on this
    machine. Settings that cannot work are refused.
    """
    from pipeline.recipe import load
    from pipeline.stages.check import check as check_recipe

    report = check_recipe(load(recipe, overrides or []), console)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        report.print(Console(markup=False))


@app.command()
@reported
def export(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A run, a phase of it, a checkpoint, a model.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A new folder, or an empty one.")],
    as_json: AsJson = False,
) -> None:
    """Write a model folder that others can load, with tokenizer and model card.

    It is of Hugging Face's layout where transformers has the family. Of a phase that is still in
    training, its newest whole checkpoint is taken.
    """
    from pipeline.stages.export import export as export_model

    done = export_model(source, output)
    typer.echo(json.dumps(done.to_json(), ensure_ascii=False) if as_json else done.folder)


@app.command()
@reported
def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    address: Address = LOCAL_CLUSTER,
    name: Annotated[
        str,
        typer.Option(help="The job's id. Default: made from what the recipe says."),
    ] = "",
    detach: Annotated[bool, typer.Option(help="Print the job's id and return at once.")] = False,
    from_checkpoint: FromCheckpoint = False,
    restart: Restart = False,
    allow_removals: AllowRemovals = False,
) -> int:
    """Run a recipe on a Ray cluster as a job; follow its log and return its exit status.

    Where a job of the very recipe runs already, that is followed; after one that ended, a new one
    goes on. The cluster needs Sightline installed. Relative paths in the recipe are those of this
    folder, where the cluster's head is this machine; elsewhere use URLs.
    """
    from pipeline.recipe import load
    from pipeline.stages.submit import JobClient

    resolved = load(recipe, overrides or [])
    client = JobClient(address)
    flag = {"continue": ["--from-checkpoint"], "restart": ["--restart"], "refuse": []}
    flags = flag[_decision(from_checkpoint, restart)]
    flags += ["--allow-removals"] if allow_removals else []
    given = ["sightline", "submit", recipe, *(overrides or []), "--address", address]
    submitted = client.submit(resolved, name, flags, shlex.join(given))
    job = submitted.job
    if detach:
        typer.echo(job)
        return 0
    found = "" if submitted.is_new else " runs already, and is followed"
    return _follow(client, job, f"job {job} at {address}{found}; Ctrl-C leaves it running")


def _follow(client: "JobClient", job: str, announced: str) -> int:
    try:
        console.print(announced, highlight=False, soft_wrap=True)
        return client.follow(job)
    except KeyboardInterrupt:
        console.print(
            f"The job goes on. Follow it: {client.command('logs', job)} --follow\n"
            f"Stop it: {client.command('stop', job)}",
            highlight=False,
            soft_wrap=True,
        )
        return INTERRUPTED_STATUS


@job_app.command("status")
@reported
def job_status(job: str, address: Address = LOCAL_CLUSTER) -> None:
    """Print PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    from pipeline.stages.submit import JobClient

    typer.echo(JobClient(address).status(job))


@job_app.command("logs")
@reported
def job_logs(job: str, address: Address = LOCAL_CLUSTER, follow: bool = False) -> int:
    """Print what a job has logged; with --follow until it ends, returning its exit status."""
    from pipeline.stages.submit import JobClient

    client = JobClient(address)
    if follow:
        return _follow(client, job, f"job {job} at {address}; Ctrl-C leaves it running")
    typer.echo(client.logs(job))
    return 0


@job_app.command("stop")
@reported
def job_stop(job: str, address: Address = LOCAL_CLUSTER) -> None:
    """Ask a job to stop; submitting the recipe again continues it."""
    from pipeline.stages.submit import JobClient

    JobClient(address).stop(job)


@data_app.command("info")
@reported
def data_info(dataset: DatasetUrl, as_json: AsJson = False) -> None:
    """Print what a dataset holds: splits, samples, texts, bytes, features, rejects by reason."""
    from pipeline.data.manifest.info import describe

    found = describe(dataset)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    table = Table(title=f"{found['dataset']}, version {found['version']}", title_justify="left")
    for column in next(iter(found["splits"].values()), {"samples": 0}):
        table.add_column(column, justify="right")
    table.columns.insert(0, Column("split"))
    for split, counts in found["splits"].items():
        table.add_row(split, *(f"{count:,}" for count in counts.values()))
    output = Console(markup=False)
    output.print(table)
    for extractor, number in found["features"].items():
        output.print(f"features {extractor}: {number:,} samples")
    for extractor, reasons in found["feature_rejects"].items():
        for reason, number in reasons.items():
            output.print(f"features {extractor}: {number:,} rejects, {reason}")
    for reason, number in found["rejects"].items():
        output.print(f"rejects {reason}: {number:,}")


@data_app.command("preview")
@reported
def data_preview(
    dataset: DatasetUrl,
    output: Annotated[str, typer.Option(help="Where to write the page.")] = "preview.html",
    limit: Annotated[int, typer.Option(help="How many samples to show.", min=1)] = 48,
    features: Annotated[str, typer.Option(help="Draw this extractor's features.")] = "",
) -> None:
    """Write an HTML page of samples with all their texts."""
    from pipeline.report.preview import write_preview

    typer.echo(write_preview(dataset, output, limit, features or None))


@data_app.command("rejects")
@reported
def data_rejects(
    dataset: DatasetUrl,
    reason: Annotated[str, typer.Option(help="Only those with this reason.")] = "",
    version: Version = None,
    as_json: AsJson = False,
) -> None:
    """List the records that are no samples, with reason and detail.

    Without --json a line for each: key, split, reason and detail, with tabs between them.
    """
    from pipeline.data.manifest.info import rejects

    found = rejects(dataset, version, reason or None).to_pylist()
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    for row in found:
        typer.echo("\t".join(" ".join((value or "").split()) for value in row.values()))


@data_app.command("diff")
@reported
def data_diff(
    dataset: DatasetUrl,
    before: Annotated[int, typer.Argument(metavar="V1", help="A version of the manifest.")],
    after: Annotated[int, typer.Argument(metavar="V2", help="Another, usually a later one.")],
    as_json: AsJson = False,
) -> None:
    """Say what changed between two versions: samples added, removed, edited, rejected.

    Without --json a line for each: change, key, split, and what it was; totals go to stderr.
    """
    from pipeline.data.manifest.diff import diff

    found = diff(dataset, before, after)
    if as_json:
        summary = {
            "dataset": dataset,
            "before": {"version": before, "samples": found.num_before},
            "after": {"version": after, "samples": found.num_after},
            "counts": found.counts(),
            "changes": found.rows.to_pylist(),
        }
        typer.echo(json.dumps(summary, ensure_ascii=False))
        return
    for row in found.rows.to_pylist():
        typer.echo("\t".join((row["change"], row["key"], row["split"], row["was"] or "")))
    counts = ", ".join(f"{change} {number:,}" for change, number in found.counts().items())
    console.print(
        f"version {before}: {found.num_before:,} samples; version {after}: {found.num_after:,}; "
        f"{counts or 'no change'}",
        highlight=False,
    )


@data_app.command("import-features")
@reported
def data_import_features(
    dataset: DatasetUrl,
    published: Annotated[
        str, typer.Argument(metavar="FILES", help="A .tsv, an .h5, or a folder of .npz.")
    ],
    stored: Annotated[
        Literal["float32", "float16", "int8", "int8-per-channel"],
        typer.Option("--storage", help="float32 keeps every bit."),
    ] = "float16",
    class_names: Annotated[str, typer.Option(help="A file with a class a line, from 0 on.")] = "",
    boxes: Annotated[
        Literal["corners", "xywh"] | None,
        typer.Option(help="How boxes in pixels are written. Default: corners, if they can be."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give a dataset features that somebody has published, unchanged.

    Reads bottom-up attention's, LXMERT's, UNITER's, OpenVQA's and VOLTA's files. What it prints
    last is what a recipe needs under `features.extractor` to train on them.
    """
    from pipeline import storage
    from pipeline.vision.extractors.imported import import_features

    names = storage.read_bytes(class_names).decode().splitlines() if class_names else []
    done = import_features(dataset, published, stored, names, boxes)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done), ensure_ascii=False))
        return
    typer.echo(
        f"{done.extractor}: {done.num_images:,} images imported, {done.num_unchanged:,} unchanged, "
        f"{done.num_missing:,} samples without, {done.num_unused:,} published ones unused"
        + (f", {done.num_repeated:,} lines repeated" if done.num_repeated else "")
        + "".join(f", {number:,} rejects: {reason}" for reason, number in done.rejects.items())
        + "\n"
        f"features.extractor: {json.dumps(done.card.config)}"
    )


@data_app.command("verify")
@reported
def data_verify(dataset: DatasetUrl, version: Version = None, as_json: AsJson = False) -> int:
    """Read every byte that a version lists and name every fault; status 1 if there is one.

    Without --json a line for each fault: kind, file, key and detail; totals go to stderr.
    """
    from pipeline.data.upkeep.verify import verify
    from pipeline.stages.progress import StageProgress

    with StageProgress(console, "verify") as progress:
        found = verify(dataset, version, progress.update)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), ensure_ascii=False))
    else:
        for fault in found.faults:
            typer.echo("\t".join((fault.kind, fault.location, fault.key, fault.detail)))
    features = "".join(
        f"; {name}: {has.num_samples:,} samples, {has.num_missing:,} without"
        + (f", {has.num_rejects:,} rejects" if has.num_rejects else "")
        for name, has in found.features.items()
    )
    console.print(
        f"version {found.version}: {found.num_samples:,} samples in {found.num_files:,} files, "
        f"{found.size_bytes:,} bytes{features}; {len(found.faults):,} faults",
        highlight=False,
    )
    return 1 if found.faults else 0


@data_app.command("compact")
@reported
def data_compact(
    dataset: DatasetUrl,
    last_versions: Annotated[int, typer.Option(help="Keep this many newest versions.", min=1)] = 10,
    run: Annotated[
        list[str] | None,
        typer.Option(help="Keep the versions this run has read; may be given several times."),
    ] = None,
    keep: Annotated[
        list[int] | None,
        typer.Option(help="Keep this version; may be given several times."),
    ] = None,
    min_age_hours: Annotated[
        int,
        typer.Option(
            help="Keep what was current or written this recently; longer than any ingest.", min=1
        ),
    ] = 24,
    as_json: AsJson = False,
) -> None:
    """Rewrite mostly dead and small shards, and remove what no kept version lists.

    Safe at any time, beside ingests and readers, and to repeat. Features are carried over.
    """
    from pipeline.data.manifest.retention import Retention, versions_of_run
    from pipeline.data.upkeep.compact import compact
    from pipeline.stages.progress import StageProgress

    of_runs = [versions_of_run(folder, dataset) for folder in run or []]
    versions = frozenset(keep or []).union(*of_runs)
    retention = Retention(last_versions, versions, min_age_hours)
    with StageProgress(console, "compact") as progress:
        done = compact(dataset, retention, progress.update)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done), ensure_ascii=False))
        return
    typer.echo(
        f"version {done.version}: {done.num_rewritten:,} samples rewritten into "
        f"{done.num_shards:,} shards; {done.num_removed:,} files removed, "
        f"{done.removed_bytes:,} bytes; versions kept: {done.kept}"
    )


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


BENCH_VERBS = {
    "ingest": "Write shards beside GNU tar, img2dataset and webdataset: processor time per byte.",
    "loader": "Read features and images beside the machine's limit, webdataset and litdata.",
    "extract": "Compute features beside the network's bare forward pass and Ray Data.",
    "model": "Train and write beside transformers' models: times, ratios, and what makes them.",
    "scale": "Open and re-ingest datasets of two sizes: what follows shards, what samples.",
    "train": "Train beside a bare torch loop: steps, start-up, two workers, a checkpoint's cost.",
}


def _add_bench_verb(name: str, description: str) -> None:
    @reported
    def verb(
        settings: Annotated[
            list[str] | None,
            typer.Argument(metavar="[KEY=VALUE]…", help="Settings by key, as `rounds=5`."),
        ] = None,
        print_settings: Annotated[
            bool, typer.Option("--print-settings", help="Print every setting and do nothing.")
        ] = False,
        as_json: AsJson = False,
    ) -> None:
        from pipeline import config
        from pipeline.perf.benches import BENCHES

        bench = BENCHES[name]
        document = config.overridden({}, settings or [])
        resolved = config.check(bench.config, document, f"bench {name}")
        if print_settings:
            typer.echo(config.to_yaml(resolved), nl=False)
            return
        output = console if as_json else Console(markup=False)
        result = bench.run(resolved, lambda table: table.print(output))
        if as_json:
            typer.echo(json.dumps(result.to_json(), ensure_ascii=False))
        else:
            output.print(result.made_with(), highlight=False, soft_wrap=True)

    bench_app.command(name, help=description)(verb)


for _name, _description in BENCH_VERBS.items():
    _add_bench_verb(_name, _description)


if __name__ == "__main__":
    main()
