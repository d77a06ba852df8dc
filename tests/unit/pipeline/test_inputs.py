from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.datasets import DATASETS, Storage
from pipeline import inputs
from pipeline.config import PipelineError
from pipeline.contact_sheet import write_contact_sheet
from pipeline.experiments import load_experiment
from pipeline.loop import build_model
from tests.pictures import write_class_folders


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("pictures"), classes=("cat", "dog", "emu"))


@pytest.fixture(scope="module")
def settings(pictures, tmp_path_factory):
    prepared = tmp_path_factory.mktemp("prepared")
    return [f"data.raw={pictures}", f"data.prepared={prepared}", "train.batch_size=24"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_makes_an_experiment_with_augmentation_that_fits_it(dataset):
    experiment = load_experiment(f"{dataset}_resnet20", ["data.synthetic=[256,8]"])
    row = inputs.dataset_of(experiment)
    inputs.check_images(experiment, row)
    with torch.device("meta"):
        model = build_model(experiment, row)
    assert isinstance(model.fc, torch.nn.Linear) and model.fc.out_features == row.classes
    photographs = dataset in ("imagenet", "imagenet16", "folder")
    assert (experiment.train.crop_area is not None) == photographs
    assert experiment.train.flip == (dataset not in ("digits", "mnist", "svhn"))


@pytest.mark.parametrize("dataset", DATASETS)
def test_made_up_images_have_the_classes_of_the_data_set(dataset, tmp_path):
    settings = ["data.synthetic=[4,2]", f"data.prepared={tmp_path}"]
    experiment = load_experiment(f"{dataset}_resnet20", settings)
    row = inputs.dataset_of(experiment)
    manifest = inputs.prepare(experiment, row, lambda *_: None)
    assert manifest.classes == len(set(manifest.class_names)) == row.classes
    assert (manifest.image_size, manifest.channels) == (row.image_size, row.channels)
    assert manifest.notes == ()


def test_a_folder_brings_its_own_classes(settings):
    experiment = load_experiment("folder_resnet20", settings)
    row = inputs.dataset_of(experiment)
    assert (row.classes, row.class_names) == (3, ("cat", "dog", "emu"))
    assert inputs.training_images(experiment, row) == 72
    fewer = load_experiment("folder_resnet20", [*settings, "data.max_per_class=5"])
    assert inputs.training_images(fewer, row) == 15


def test_storage_is_that_of_the_data_set_with_the_changes_of_the_experiment():
    default = load_experiment("imagenet_resnet50")
    assert inputs.storage_of(default) == DATASETS["imagenet"].storage
    changed = load_experiment("imagenet_resnet50", ["data.side=256", "data.format=mixed"])
    assert inputs.storage_of(changed) == Storage(side=256, format="mixed")
    assert inputs.storage_of(load_experiment("cifar10_resnet20")) is None


def test_the_recipe_decides_what_the_network_sees(settings):
    options = ["train.image_size=48", "train.normalization=signed", "train.test_crop=0.875"]
    growth = ["train.first_image_size=32", "train.growth_epochs=[0,2]"]
    experiment = load_experiment("folder_resnet20", [*settings, *options, *growth])
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    train = inputs.make_loader(experiment, manifest, "train", training=True)
    for epoch, size in ((0, 32), (2, 48)):
        with train.epoch(epoch) as batches:
            images, _ = next(batches)
        assert images.shape == (24, 3, size, size)
        assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
    test = inputs.make_loader(experiment, manifest, "test", training=False)
    with test.epoch(0) as batches:
        images = torch.cat([images for images, _ in batches])
    assert images.shape == (18, 3, 48, 48)


def test_both_backends_train_on_the_same_batches(settings):
    experiments = [
        load_experiment("folder_resnet20", [*settings, f"data.backend={backend}"])
        for backend in ("ffcv", "torch")
    ]
    manifest = inputs.prepare(experiments[0], inputs.dataset_of(experiments[0]), lambda *_: None)
    batches = []
    for experiment in experiments:
        loader = inputs.make_loader(experiment, manifest, "train", training=True)
        with loader.epoch(1) as epoch:
            batches.append(next(epoch))
    (first, labels), (second, same_labels) = batches
    assert torch.equal(labels, same_labels)
    std = torch.tensor(manifest.std).view(3, 1, 1)
    assert 255 * float(((first - second) * std).abs().max()) < 1.01


def test_the_contact_sheet_is_a_picture_of_batches(settings, tmp_path):
    experiment = load_experiment("folder_resnet20", settings)
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    path = tmp_path / "new" / "sheet.png"
    write_contact_sheet(experiment, manifest, path)
    sheet = np.asarray(Image.open(path).convert("RGB"))
    assert min(sheet.shape[:2]) > 900
    # The pictures are colorful; text and bars alone would leave the upper part gray.
    upper = sheet[: sheet.shape[0] // 2].astype(int)
    assert (np.ptp(upper, axis=2) > 60).mean() > 0.2


def test_the_normalization_of_a_folder_is_measured(settings):
    experiment = load_experiment("folder_resnet20", settings)
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    index = manifest.files["train"].open_index(manifest.folder)
    data = index.path.read_bytes()
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for sample in range(len(index)):
        path = manifest.folder.parent / "sample.jpg"
        begin = int(index.pointers[sample])
        path.write_bytes(data[begin : begin + int(index.sizes[sample])])
        pixels = np.asarray(Image.open(path)).reshape(-1, 3) / 255
        sums += pixels.sum(axis=0)
        squares += (pixels**2).sum(axis=0)
        count += len(pixels)
    mean = sums / count
    np.testing.assert_allclose(manifest.mean, mean, atol=2e-4)
    np.testing.assert_allclose(manifest.std, np.sqrt(squares / count - mean**2), atol=2e-4)
    assert len(index) == 72


def test_a_contact_sheet_bears_any_class_name_and_few_images(tmp_path, recwarn):
    raw = write_class_folders(tmp_path / "raw", train=4, val=1, classes=(r"a$\x_$", "\u9ce5"))
    settings = [f"data.raw={raw}", f"data.prepared={tmp_path}", "train.batch_size=128"]
    experiment = load_experiment("folder_resnet20", settings)
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    write_contact_sheet(experiment, manifest, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []
    with pytest.raises(PipelineError, match=r"cannot write the picture: .*Not a directory|exists"):
        write_contact_sheet(experiment, manifest, tmp_path / "sheet.png" / "below.png")


def test_folders_for_another_machine_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment("digits_lenet5", ["data.prepared=here", "data.raw=there"])
    data = inputs.with_absolute_folders(experiment).data
    assert (data.prepared, data.raw, data.root) == (tmp_path / "here", tmp_path / "there", None)
