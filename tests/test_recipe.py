from pathlib import Path

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.recipe import Recipe, load
from pipeline.stages.preflight import preflight

RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
QUICKSTART = str(RECIPES / "quickstart.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_accepted_and_printed_so_that_it_reads_back(
    path: Path, tmp_path: Path
) -> None:
    overrides = ["dataset.source.images=a", "dataset.source.annotations=b"]
    recipe = config.load(Recipe, str(path), overrides if path.stem.startswith("coco") else [])
    assert recipe.name == path.stem
    printed = tmp_path / "printed.yaml"
    printed.write_text(config.to_yaml(recipe))
    assert config.load(Recipe, str(printed)) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.finetune.optimizer.lerning_rate=1",
            r"optimizer\.lerning_rate: .*'learning_rate'",
        ),
        (
            "training.finetune.learning_rate=1",
            r"finetune\.learning_rate: .* it is training\.finetune\.optimizer\.learning_rate now",
        ),
        ("training.finetune.steps=many", r"training\.finetune\.steps: found 'many'"),
        ("training.finetune.global_batch_size=3", r"micro_batch_size=\d+ is more than global"),
        ("cluster.workers=999", r"training\.pretrain: .* leaves some of 999 ranks without"),
        ("model.family=visualbrt", r"model\.family: found 'visualbrt'; .*'visualbert'"),
        ("model.sizes.widht=8", r"model: .*sizes\.widht: unknown; allowed: .*width"),
        ("model.sizes.vocab_size=8", r"sizes\.vocab_size follows from the data"),
        ("model.sizes.num_heads=7", r"width=\d+ is not a multiple of num_heads=7"),
        ("model.max_tokens=500", r"max_tokens=500 is more than sizes\.max_positions"),
        ("objectives={itc: {}}", r"family=visualbert .*'itc' of objectives: .* can: late_fusion"),
        ("objectives={mrm: {features: {}}}", r"visualbert .*'mrm'.* can: lxmert, vilbert, uniter"),
        (
            "model={family: lxmert, max_tokens: 12, sizes: {max_positions: 32}}",
            r"family=lxmert .*'lm' of benchmarks: .* can: visualbert, uniter, visual_prefix",
        ),
        ("benchmarks.caption.max_tokens=500", r"benchmarks\.caption\.max_tokens=500 is more than"),
        ("benchmarks.vqa.max_tokens=500", r"vqa\.max_tokens=500 .* model\.sizes\.max_positions"),
        (
            "training.finetune={steps: 9, global_batch_size: 8, micro_batch_size: 8, "
            "evaluation: {every_steps: 3, best_by: cider}}",
            r"training\.finetune\.evaluation\.best_by=cider: .* gives loss, lm, answer",
        ),
        (
            "training.finetune.deepspeed={zero_optimization: {offload_optimizer: cpu}}",
            r"zero_optimization\.offload_optimizer: expected a mapping, found 'cpu'",
        ),
        ("features.extractor.patch_size=7", r"patch_size"),
        ("objectives=null", r"objectives and training\.pretrain are given together"),
        ("benchmarks={}", r"benchmarks: no benchmark is given; choose from vqa, caption"),
        ("dataset.source={type: shape}", r"dataset\.source.*'shape'.*'shapes'"),
    ],
)
def test_a_wrong_key_type_or_combination_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(Recipe, QUICKSTART, [override])


def test_relative_locations_are_told_from_absolute_ones_and_urls() -> None:
    recipe = config.load(Recipe, QUICKSTART, ["run=/tmp/run", "dataset.path=s3://bucket/data"])
    assert recipe.relative_locations() == []
    recipe = config.load(Recipe, QUICKSTART, ["run=runs/a", "dataset.path=/data"])
    assert recipe.relative_locations() == ["runs/a"]


def test_a_recipe_on_a_cluster_uses_the_cluster_it_is_part_of() -> None:
    recipe = config.load(Recipe, QUICKSTART)
    assert recipe.cluster.address is None
    assert recipe.on_cluster().cluster.address == "auto"


def test_pictures_in_the_tars_of_others_cannot_be_encoded_anew() -> None:
    tars = "dataset.source={type: webdataset, shards: [a.tar]}"
    config.load(Recipe, QUICKSTART, [tars])
    with pytest.raises(ConfigError, match=r"dataset.*in_place: false"):
        config.load(Recipe, QUICKSTART, [tars, "dataset.ingest.reencode={}"])
    copied = "dataset.source={type: webdataset, shards: [a.tar], in_place: false}"
    config.load(Recipe, QUICKSTART, [copied, "dataset.ingest.reencode={}"])


def test_contrast_needs_the_global_batch_in_one_pass() -> None:
    contrast = [
        "objectives={itc: {}}",
        "model.family=late_fusion",
        "model.sizes={}",
        "benchmarks.caption=null",
    ]
    config.load(Recipe, QUICKSTART, contrast)
    for several_passes in (
        "training.pretrain.micro_batch_size=16",  # of 64 on two ranks
        "training.pretrain.loading.tokens_per_micro_batch=500",
        "cluster.min_workers=1",
        "cluster.workers=3",
    ):
        with pytest.raises(ConfigError, match=r"objectives\.itc contrasts the whole global batch"):
            config.load(Recipe, QUICKSTART, [*contrast, several_passes])


def test_any_number_of_ranks_shares_the_global_batch_if_each_has_a_sample() -> None:
    config.load(Recipe, QUICKSTART, ["cluster.workers=7", "cluster.min_workers=1"])
    with pytest.raises(ConfigError, match=r"without a sample.*cluster\.workers"):
        config.load(Recipe, QUICKSTART, ["cluster.workers=65"])


def test_a_teacher_of_either_phase_is_looked_for_before_work() -> None:
    given = ["benchmarks.distill={teacher: large, hidden: {}}"]
    recipe = config.load(Recipe, QUICKSTART, given)
    assert list(recipe.teachers()) == ["benchmarks.distill.teacher"]
    with pytest.raises(ConfigError, match=r"benchmarks\.distill\.teacher: .*large: no such"):
        preflight(recipe)


def test_a_misspelt_key_of_deepspeed_is_refused_before_work_in_each_phase() -> None:
    given = [
        "training.finetune.deepspeed={wall_clock_breakdwn: true}",
        "training.pretrain.deepspeed={zero_optimization: {overlap_com: true}}",
    ]
    expected = (
        r"training\.pretrain\.deepspeed\.zero_optimization\.overlap_com: .*'overlap_comm'.*\n"
        r".*training\.finetune\.deepspeed\.wall_clock_breakdwn: .*'wall_clock_breakdown'"
    )
    with pytest.raises(ConfigError, match=expected):
        preflight(config.load(Recipe, QUICKSTART, given))


def test_the_recipe_that_a_run_left_before_settings_had_groups_is_read_as_it_was(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    text = (Path(__file__).parent / "flat_recipe.yaml").read_text().replace("FOLDER", str(run))
    (run / "recipe.yaml").write_text(text)
    assert load(str(run / "recipe.yaml")) == load(QUICKSTART, [f"run={run}"])
    (tmp_path / "mine.yaml").write_text(text)
    expected = r"finetune\.decay: .* it is training\.finetune\.schedule\.decay now"
    with pytest.raises(ConfigError, match=expected):
        load(str(tmp_path / "mine.yaml"))
