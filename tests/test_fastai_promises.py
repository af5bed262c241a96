"""The promises of fastai in a fresh process that has only the README's imports: kept, or refused.

`promises.py` asks; here is what the answers must be. A refusal is one sentence with the way out.
"""
import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import wings

REFUSED = {  # question: type of the error, and what it must say
    "show_results": ("TypeError", "learn.show_views() shows what it is asked to match"),
    "predict": ("TypeError", "represent(learn.model.encoder, clean_loader(dls)) gives h"),
    "get_preds": ("TypeError", "represent(learn.model.encoder, clean_loader(dls)) gives h"),
    "tta": ("TypeError", "represent(learn.model.encoder, clean_loader(dls)) gives h"),
    "fine_tune": ("TypeError", "simclr_nb.evaluate.tuning.finetune trains on labels"),
    "freeze": ("TypeError", "are weights and biases, not layers"),
    "mixup": ("ValueError", "MixUp mixes images with their labels"),
    "mixup_from_the_start": ("ValueError", "CutMix mixes images with their labels"),
    "metrics": ("ValueError", "accuracy scores predicted labels"),
    "metrics_of_sklearn": ("ValueError", "f1_score scores predicted labels"),
    "batches_of_one": ("ValueError", "bs must be at least 2, got 1"),
    "labels_from_1": ("ValueError", "labels 0 to 2 of 3 classes, got 3: count them from 0"),
    "no_validation_set": ("ValueError", "give the DataLoaders a second set"),
    "empty_validation_set": ("ValueError", "give the DataLoaders a second set"),
    "torch_loaders": ("TypeError", "DataLoaders.from_dsets(train, valid, bs=64) makes them"),
    "width_of_others": ("ValueError", "'torchvision/resnet18' has no width, got 0.5: leave it out"),
    "width_of_the_command": ("ValueError", "has no width, got 0.5: leave it out"),
    "width_of_a_module": ("ValueError", "Sequential has no width, got 0.5: leave it out"),
    "stem_of_others": ("ValueError", "has no stem, got 'cifar': leave it out"),
    "torch_script_of_others": ("TypeError", "use torch.export.export"),
}

@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    "Question to answer, from a process of its own, and what it printed."
    folder = tmp_path_factory.mktemp("promises")
    generator = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (folder / "photos" / kind).mkdir(parents=True)
        for i in range(16):
            pixels = generator.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / kind / f"{i}.jpg")

    script = Path(__file__).with_name("promises.py")
    done = subprocess.run([sys.executable, script, folder], text=True, timeout=300,
                          capture_output=True, env=os.environ | {"MPLBACKEND": "agg"})
    printed, _, answers = done.stdout.rpartition("ANSWERS")
    assert done.returncode == 0 and answers, done.stderr[-3000:]
    return json.loads(answers) | {"printed": printed}


@pytest.mark.parametrize("question", REFUSED)
def test_refused_in_a_sentence(answers, question):
    "A verb that cannot work says so, and names one that does."
    kind, text = answers[question]
    expected, words = REFUSED[question]
    assert kind == expected and words in text, text
    assert len(text) < 300 and "\n\n" not in text


def test_verbs_exist_without_other_imports(answers):
    "A search of the learning rate gives the weights back; all fits train, in mixed precision too."
    assert answers["lr_find"] is True
    assert set(answers["fits"]) == {"train_loss", "valid_loss", "contrastive_top1", "probe", "knn"}
    assert answers["validate"] == [True, True]
    assert answers["export"] is True
    for text in answers["summary"]: assert "Total params: 49,412" in text and "NTXent" in text


def test_show_batch(answers):
    "Of files 8 images, two crops of each; of arrays 16 images."
    assert answers["show_batch"] == [16, 16, 16]


def test_callbacks(answers):
    "Table to a file, best model, early end, and a step for each 64 images of batches of 32."
    header, *rows = answers["csv_logger"]
    assert header == "epoch,train_loss,valid_loss,contrastive_top1,probe,knn,time"
    assert len(rows) == 2
    assert answers["save_model"] is True
    assert answers["early_stopping"] == 2  # of 5 epochs: none is better by 2 than the first
    assert answers["gradient_accumulation"] == [1, 3]  # after the second and the fourth batch
    assert answers["own_metric"]["length"] > 0


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_loggers(answers, package):
    "All columns are logged, predictions are not, which is printed; an error names what is missing."
    logged = answers[package]
    if not find_spec(package):
        assert logged == ["ModuleNotFoundError", f"No module named '{package}'"]
        return
    assert {"train_loss", "valid_loss", "contrastive_top1", "probe", "knn"} <= set(logged), logged
    name = {"tensorboard": "TensorBoardCallback", "wandb": "WandbCallback"}[package]
    assert f"{name}: log_preds=False" in answers["printed"]


def test_last_batch_of_one_image(answers):
    "17 images in batches of 8: two losses an epoch, three steps of the schedule, a finite table."
    n_losses, steps, row = answers["last_batch_of_one"]
    assert (n_losses, steps) == (4, 6)
    assert None not in row.values(), row


def test_only_image_does_not_count_in_the_validation_loss(answers):
    "Its batch was counted with the loss of the batch before."
    alone, longer = answers["valid_loss_without_the_only_image"]
    assert alone == longer


def test_labels_of_another_kind_leave_the_probe_out(answers):
    "Several labels an image: pretraining goes on, and a line says what is left out."
    for question in ("several_labels", "several_labels_of_fastai"):
        assert answers[question] == ["train_loss", "valid_loss", "contrastive_top1"]
    assert "no probe and no k-NN: they need labels of one class for each image" in answers["printed"]


def test_way_out_of_torch_loaders(answers):
    "The way out that the error about torch's loaders names works."
    assert answers["way_out_of_torch_loaders"] == ["train_loss", "valid_loss", "contrastive_top1"]


def test_encoders_of_other_libraries(answers):
    "Transformers take the size of the views, and load again; blocks start at work where asked to."
    if find_spec("timm"):
        assert answers["timm_transformer_of_another_size"] == 32
        assert answers["blocks_of_others_at_work"] is True
    assert answers["torchvision_transformer_of_another_size"] == 768


def test_encoders_leave(answers):
    "TorchScript for ours; export, tracing and ONNX, any batch size, for a network cut at a layer."
    assert answers["torch_script"] == [True, True]
    assert answers["torch_export_of_a_cut_encoder"] == [True, True]
    onnx = answers["onnx_of_a_cut_encoder"]
    assert onnx is True or "onnx" in onnx[1], onnx


def test_fastai_is_imported_quietly_whatever_comes_first():
    "No room imports fastai before `core.quiet`, which keeps its warning back."
    names = wings.order()
    quiet = {"core.quiet"}
    for name in names:  # a room imports only from rooms before it
        path = ROOT / "simclr_nb" / f"{name.replace('.', '/')}.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.Import | ast.ImportFrom): continue
            modules = imported(node, name)
            if quiet.intersection(modules): quiet.add(name)
            loud = [module for module in modules if module.split(".")[0] == "fastai"]
            assert name in quiet or not loud, f"{name}: import simclr_nb.core.quiet before {loud}"


def imported(node: ast.Import | ast.ImportFrom, room: str) -> list[str]:
    "Modules of an import: rooms as `core.quiet`, others as they are."
    if isinstance(node, ast.Import): found = [alias.name for alias in node.names]
    elif node.level:
        package = ["simclr_nb", *room.split(".")[:-1]]
        found = [".".join([*package[: len(package) - node.level + 1], node.module or ""])]
    else: found = [node.module]
    return [module.removeprefix("simclr_nb.") for module in found]
