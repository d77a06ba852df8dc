from __future__ import annotations

import pytest

from pipeline.config import Experiment, PipelineError, flatten
from pipeline.experiments import catalog, load_experiment
from pipeline.settings import (
    build_experiment,
    load_yaml,
    override,
    parse_overrides,
    setting_fields,
    without_effect,
)

BASE = Experiment(name="digits_lenet5", dataset="digits", backbone="lenet5")


def test_overrides_reach_every_level_and_type():
    changed = override(
        BASE,
        [
            "train.epochs=3",
            "train.lr=1e-3",
            "train.milestones=[1,2.5]",
            "train.schedule=multistep",
            "method=ternary(expansion=4)",
            "scaling.workers=none",
            "data.root=/somewhere",
            "tracking.enabled=false",
            "seed=7",
        ],
    )
    assert changed.train.epochs == 3
    assert changed.train.lr == 0.001
    assert changed.train.milestones == (1.0, 2.5)
    assert changed.method == "ternary(expansion=4)"
    assert changed.scaling.workers is None
    assert str(changed.data.root) == "/somewhere"
    assert changed.tracking.enabled is False
    assert changed.seed == 7
    assert BASE.train.epochs == 10, "the base experiment is frozen"


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("train.epoch=3", ["train.epoch", "train.epochs"]),
        ("epochs=3", ["epochs", "train.epochs"]),
        ("train=3", ["group", "train.lr"]),
        ("train.epochs=0", ["train.epochs=0", "greater than 0"]),
        ("train.epochs=three", ["train.epochs='three'", "integer"]),
        ("train.epochs=2.5", ["train.epochs=2.5", "integer"]),
        ("train.lr=-1", ["train.lr", "greater than 0"]),
        ("train.lr=inf", ["train.lr", "finite"]),
        ("train.optimizer=sdg", ["train.optimizer='sdg'", "'sgd'"]),
        ("train.nesterov=maybe", ["train.nesterov='maybe'", "boolean"]),
        ("train.milestones=[3,1]", ["train.milestones", "rise"]),
        ("train.schedule=multistep", ["needs train.milestones"]),
        ("train.warmup_epochs=11", ["longer than the whole training"]),
        ("train.epochs", ["key=value"]),
        ("train.epochs=[", ["train.epochs='['"]),
        ("data.synthetic=[1]", ["data.synthetic"]),
        ("name=other", ["unknown setting 'name'"]),
        ("seed=-1", ["seed=-1"]),
        ("seed=2024-02-30", ["seed="]),
        ("seed=1:30", ["seed='1:30'"]),
        ("train.epochs=true", ["train.epochs=True", "not true or false"]),
        ("scaling.timeout=0.1", ["scaling.timeout", "greater than or equal to 1"]),
        ("seed=99999999999999", ["seed=99999999999999", "less than"]),
    ],
)
def test_bad_overrides_are_one_line_that_names_the_setting(word, parts):
    with pytest.raises(PipelineError) as caught:
        override(BASE, [word])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_every_setting_has_a_description():
    undescribed = [key for key, field in setting_fields().items() if not field.description]
    assert undescribed == ["dataset"]


def test_yaml_round_trip_gives_the_same_experiment(tmp_path):
    for experiment in list(catalog().values())[::10]:
        path = tmp_path / "experiment.yaml"
        path.write_text(experiment.to_yaml())
        assert load_yaml(path) == experiment


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "holds no experiment"),
        ("a: [", "is not YAML"),
        ("name: x\ndataset: digits\n", "'backbone' is missing"),
        ("name: x\ndataset: digits\nbackbone: lenet5\nepochs: 3\n", "unknown setting 'epochs'"),
        ("name: x\ndataset: digits\nbackbone: lenet5\ntrain: {lr: no}\n", "train.lr"),
    ],
)
def test_a_bad_yaml_is_one_line_that_names_the_file(tmp_path, text, part):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match=r"bad\.yaml") as caught:
        load_yaml(path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_yaml_is_named(tmp_path):
    with pytest.raises(PipelineError, match="nowhere"):
        load_yaml(tmp_path / "nowhere.yaml")


def test_identity_depends_on_what_decides_the_weights_and_on_nothing_else():
    identity = BASE.identity("data")
    changing = ["train.epochs=3", "seed=1", "method=ternary", "train.lr=0.2", "backbone=vgg"]
    same = ["scaling.workers=4", "tracking.runs=elsewhere", "data.root=/x", "data.backend=torch"]
    same += ["seeds=3"]
    assert len({override(BASE, [word]).identity("data") for word in changing} | {identity}) == 6
    assert {override(BASE, [word]).identity("data") for word in same} == {identity}
    assert BASE.identity("other data") != identity


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train.momentum=0.5", "train.optimizer=adam"], "train.momentum"),
        (["train.gamma=0.5"], "train.gamma"),
        (["train.patience=3"], "train.patience"),
        (["train.nesterov=false", "train.optimizer=rmsprop"], "train.nesterov"),
        (["train.schedule_unit=epoch", "train.schedule=constant"], "train.schedule_unit"),
        (["train.temperature=2"], "train.temperature"),
        (["train.teacher_weight=0.9"], "train.teacher_weight"),
        (["train.growth_epochs=[0,1]"], "train.growth_epochs"),
        (["train.test_size=32"], "train.test_size"),
        (["train.first_image_size=32", "train.growth_epochs=[0,1]"], "train.first_image_size"),
        (["train.lr_batch_size=128"], "train.lr_batch_size"),
        (["train.sync_batchnorm=true", "scaling.workers=1"], "train.sync_batchnorm"),
        (["scaling.nodes=2", "scaling.launcher=local"], "scaling.nodes"),
        (["scaling.gpu=H100", "scaling.launcher=local"], "scaling.gpu"),
        (["checkpoint.minutes=5", "checkpoint.steps=100"], "checkpoint.minutes"),
        (["tracking.register_model=false", "tracking.enabled=false"], "tracking.register_model"),
        (["scaling.workers=3", "scaling.launcher=local"], "scaling.workers"),
        (["tracking.uri=http://x", "tracking.enabled=false"], "tracking.uri"),
        (["data.root=/x"], "data.root"),
        (["train.latent_weight_decay=0"], "train.latent_weight_decay"),
        (
            ["train.latent_weight_decay=0", "method=sparse-psd2p8+step"],
            "train.latent_weight_decay",
        ),
    ],
)
def test_an_override_without_effect_is_said(words, key):
    lines = without_effect(override(BASE, words), words)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{key} has no effect with ")


def test_fewer_images_of_each_class_are_taken_of_built_in_ones_too():
    words = ["dataset=digits", "data.max_per_class=20", "data.side=64"]
    (line,) = without_effect(override(BASE, words), words)
    assert line.startswith("data.side has no effect with dataset=digits")


def test_an_override_without_effect_names_the_setting_that_is_in_the_way():
    words = ["tracking.uri=http://x", "tracking.enabled=false", "train.temperature=2"]
    words += ["train.patience=3", "train.test_size=32"]
    assert without_effect(override(BASE, words), words) == [
        "tracking.uri has no effect with tracking.enabled=false",
        "train.temperature has no effect with train.teacher=none",
        "train.patience has no effect with train.schedule=cosine",
        "train.test_size has no effect with train.image_size=32",
    ]


def test_an_override_with_effect_is_not_mentioned():
    words = ["train.momentum=0.5", "scaling.workers=3", "train.lr=1"]
    words += ["train.latent_weight_decay=0", "method=sparse+ternary", "checkpoint.minutes=5"]
    words += ["train.teacher=models:/big@candidate", "train.temperature=2", "train.test_size=40"]
    words += ["train.schedule=plateau", "train.validation=99", "train.patience=1"]
    words += ["train.gamma=0.2", "train.lr_batch_size=256"]
    assert without_effect(override(BASE, words), words) == []


@pytest.mark.parametrize("has_gpu", [True, False])
def test_cores_of_a_local_training_act_beside_a_gpu_only(monkeypatch, has_gpu):
    """They then are those that read images, see ``inputs.reading``."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    words = ["scaling.cores=4", "scaling.launcher=local"]
    idle = "scaling.cores has no effect with scaling.launcher=local without a GPU"
    assert without_effect(override(BASE, words), words) == ([] if has_gpu else [idle])


def test_flatten_gives_the_keys_that_overrides_take():
    flat = flatten(BASE.model_dump(mode="json", exclude={"name", "reference"}))
    assert list(flat) == list(setting_fields())


def test_values_are_parsed_as_yaml_and_words_of_calls_stay_text():
    values = parse_overrides(["seed=3", "train.flip=true", "method=ternary(expansion=2)"])
    assert values == {"seed": 3, "train.flip": True, "method": "ternary(expansion=2)"}


def test_none_is_a_word_where_a_setting_knows_it_and_nothing_elsewhere():
    changed = override(BASE, ["train.compile=none", "train.clip_norm=none"])
    assert (changed.train.compile, changed.train.clip_norm) == ("none", None)


def test_a_switch_that_may_be_none_can_be_true_and_false():
    for text, value in (("true", True), ("false", False), ("none", None)):
        assert override(BASE, [f"data.passthrough={text}"]).data.passthrough is value


def test_numbers_are_decimal_and_folders_stay_text():
    changed = override(BASE, ["train.epochs=010", "tracking.runs=2024", "tracking.uri=1e3"])
    assert changed.train.epochs == 10
    assert str(changed.tracking.runs) == "2024"
    assert changed.tracking.uri == "1e3"


@pytest.mark.parametrize("name", ["", "a/../../b", "my run: v2", ".hidden", "a%b"])
def test_a_name_that_no_folder_or_registry_takes_is_refused(name):
    values = BASE.model_dump() | {"name": name}
    with pytest.raises(PipelineError, match="name"):
        build_experiment(values)


def test_an_uncurated_name_resolves_by_the_grammar_and_is_untuned():
    experiment = load_experiment("mnist_lenet5_ternary-x4", ["train.epochs=1"])
    assert experiment.tuned
    other = load_experiment("digits_resnet20_float")
    assert (other.dataset, other.backbone, other.method) == ("digits", "resnet20", "float")
    assert not other.tuned


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("digits_lenet5_tenrary", "ternary"),
        ("digit_lenet5", "digits"),
        ("digits_lenet", "lenet5"),
        ("digits", "digits_lenet5"),
        ("a_b_c_d_e", "--list"),
        ("digits_lenet5_ternary-1.5", "must match"),
        ("", "--list"),
    ],
)
def test_an_unknown_experiment_names_the_nearest(name, part):
    with pytest.raises(PipelineError) as caught:
        load_experiment(name)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "digits_lenet5_ternary(thresholds=0.1)",
        "digits_lenet5_binary(ternary_weights=all)",
        "digits_lenet5(width=2)_ternary",
    ],
)
def test_arguments_in_a_name_are_sent_to_the_settings(name):
    with pytest.raises(PipelineError, match=r"names take short forms alone.* method='") as caught:
        load_experiment(name)
    assert "\n" not in str(caught.value)


def test_every_curated_name_says_its_parts():
    for name, experiment in catalog().items():
        assert name.startswith(f"{experiment.dataset}_{experiment.backbone.partition('(')[0]}")
        assert experiment.tuned


def test_a_published_figure_does_not_stay_beside_another_network():
    assert load_experiment("mnist_lenet5", ["train.epochs=1", "seed=3", "seeds=2"]).tuned
    for word in ("method=ternary", "dataset=digits", "backbone=lenet5(width=2)"):
        assert not load_experiment("mnist_lenet5", [word]).tuned
    assert load_experiment("mnist_lenet5", ["method=float"]).tuned, "nothing was changed"


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    changed = override(BASE, ["data.root=~/raw", "tracking.runs=~/runs"])
    assert changed.data.root == tmp_path / "raw"
    assert changed.tracking.runs == tmp_path / "runs"
