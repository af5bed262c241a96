"""The promises of fastai, tested in a process that has only the imports of the README.

`python tests/promises.py FOLDER` answers all questions, in order, and prints JSON: question to answer,
or to the type and text of the error.
"""
import json
import math
import os
import sys
import warnings
from pathlib import Path

from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner

warnings.simplefilter("ignore")
FOLDER = Path(sys.argv[1])
os.chdir(FOLDER)  # where defaults write
QUESTIONS = {}


def question(ask):
    "Register a function as a question."
    QUESTIONS[ask.__name__] = ask
    return ask


def quiet_learner(dls=None, arch="resnet18", **kwargs):
    "A small learner without bars and tables."
    if arch == "resnet18": kwargs.setdefault("width", 1 / 16)
    learn = simclr_learner(dls or DIGITS, arch, path=FOLDER / "learner", **kwargs)
    learn.no_bar().__enter__()
    learn.no_logging().__enter__()
    return learn


def fitted(*cbs, dls=None, epochs=2, **kwargs):
    "A learner after a short fit."
    learn = quiet_learner(dls, **kwargs)
    learn.fit(epochs, 0.1, cbs=cbs)
    return learn


def last_row(learn) -> dict:
    "Last row of the table, NaN and nothing as None."
    row = zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1])
    return {k: v if v is not None and math.isfinite(v) else None for k, v in row}


# Verbs come first: nothing of fastai is imported before them


@question
def lr_find():
    learn = quiet_learner()
    before = [p.clone() for p in learn.model.parameters()]
    rate = learn.lr_find(num_it=20, show_plot=False).valley
    same = all((a == b).all() for a, b in zip(before, learn.model.parameters(), strict=True))
    return bool(rate > 0 and same)


@question
def fits():
    learn = quiet_learner()
    for fit in (learn.fit_one_cycle, learn.fit_flat_cos): fit(1, 0.1)
    learn.fit_sgdr(1, 1, 0.1)
    learn.to_fp16().fit_one_cycle(1, 0.1)
    learn.to_fp32().pretrain(1)
    return last_row(learn)


@question
def summary():
    learn = quiet_learner()
    return [str(learn.summary()), (learn.fit(1, 0.1), str(learn.summary()))[1]]


@question
def validate(): return [quiet_learner().validate()[0] > 0, fitted().validate()[2] >= 0]


@question
def show_results(): quiet_learner().show_results()


@question
def predict(): quiet_learner().predict(FOLDER / "photos/cat/0.jpg")


@question
def get_preds(): quiet_learner().get_preds()


@question
def tta(): quiet_learner().tta()


@question
def fine_tune(): quiet_learner().fine_tune(1)


@question
def freeze(): quiet_learner().freeze()


@question
def show_batch():
    dls = simclr_dls(FOLDER / "photos", size=16, bs=8, num_workers=0)
    figures = [dls.show_batch(), DIGITS.show_batch(), DIGITS.valid.show_batch()]
    return [len(figure.axes) for figure in figures]


@question
def export():
    import torch
    learn = fitted(epochs=1)
    learn.export("learner.pkl")
    from fastai.learner import load_learner
    again = load_learner(FOLDER / "learner/learner.pkl").model.eval()
    x = torch.rand(4, 3, 8, 8)
    return torch.equal(again.encode(x), learn.model.eval().encode(x))


# Callbacks, each as its documentation writes it


@question
def csv_logger():
    from fastai.callback.progress import CSVLogger
    learn = fitted(CSVLogger())
    return (learn.path / "history.csv").read_text().splitlines()


@question
def save_model():
    from fastai.callback.tracker import SaveModelCallback
    learn = fitted(SaveModelCallback(monitor="knn"))
    learn.load("model")
    return (learn.path / "models/model.pth").is_file()


@question
def early_stopping():
    from fastai.callback.tracker import EarlyStoppingCallback
    stop = EarlyStoppingCallback(monitor="contrastive_top1", min_delta=2.0, patience=1)
    learn = quiet_learner()
    learn.pretrain(5, cbs=stop)
    return len(learn.recorder.values)


@question
def gradient_accumulation():
    from fastai.callback.core import Callback
    from fastai.callback.training import GradientAccumulation, GradientClip
    steps = []

    class Count(Callback):
        def after_step(self): steps.append(self.train_iter)

    fitted(GradientAccumulation(64), GradientClip(), Count(), epochs=1)
    return steps


@question
def mixup():
    from fastai.callback.mixup import MixUp
    fitted(MixUp())


@question
def mixup_from_the_start():
    from fastai.callback.mixup import CutMix
    quiet_learner(cbs=CutMix)


@question
def metrics():
    from fastai.metrics import accuracy
    quiet_learner(metrics=[accuracy])


@question
def metrics_of_sklearn():
    from fastai.metrics import F1Score
    quiet_learner(metrics=F1Score())


@question
def own_metric():
    def length(out, y): return out.z.norm(dim=1).mean()
    return last_row(fitted(metrics=[length], epochs=1))


@question
def tensorboard():
    from fastai.callback.tensorboard import TensorBoardCallback
    fitted(TensorBoardCallback())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = next(Path("runs").iterdir())
    return EventAccumulator(str(board)).Reload().Tags()["scalars"]


@question
def wandb():
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DIR=str(FOLDER))
    import wandb
    from fastai.callback.wandb import WandbCallback
    run = wandb.init(project="promises")
    fitted(WandbCallback())
    return sorted(run.summary.keys())


# Data of other origins


def dataset(n, start=0, labels=None):
    "Images in memory with labels 0, 1, 2 in turn, or as given."
    import torch
    x = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)
    y = torch.arange(n) % 3 + start if labels is None else labels
    return torch.utils.data.TensorDataset(x, y)


def loaders(train, valid, bs=8, vocab="abc"):
    "fastai's DataLoaders of two datasets; the last batch stays."
    from fastai.data.core import DataLoaders
    dls = DataLoaders.from_dsets(train, valid, bs=bs, drop_last=False)
    if vocab: dls.vocab = list(vocab)
    return dls


@question
def last_batch_of_one():
    learn = fitted(dls=loaders(dataset(17), dataset(9)), epochs=2)
    return [len(learn.recorder.losses), learn.train_iter, last_row(learn)]


@question
def valid_loss_without_the_only_image():
    import torch
    torch.manual_seed(0)
    train, valid = dataset(16), dataset(8)
    longer = torch.utils.data.ConcatDataset([valid, dataset(1)])
    losses = []
    for part in (valid, longer):
        learn = quiet_learner(loaders(train, part))
        torch.manual_seed(1)
        learn.model.apply(lambda m: getattr(m, "reset_parameters", int)())
        torch.manual_seed(2)
        losses.append(learn.validate()[0])
    return losses


@question
def batches_of_one(): quiet_learner(loaders(dataset(4), dataset(4), bs=1))


@question
def labels_from_1(): fitted(dls=loaders(dataset(16, 1), dataset(9, 1)))


@question
def several_labels():
    import torch
    many = dataset(16, labels=(torch.rand(16, 3) > 0.5).float())
    return list(last_row(fitted(dls=loaders(many, many))))


@question
def several_labels_of_fastai():
    from fastai.data.block import DataBlock, MultiCategoryBlock
    from fastai.data.transforms import get_image_files
    from fastai.vision.augment import Resize
    from fastai.vision.data import ImageBlock
    block = DataBlock((ImageBlock, MultiCategoryBlock), get_items=get_image_files,
                      get_y=lambda path: [path.parent.name, "animal"], item_tfms=Resize(16))
    return list(last_row(fitted(dls=block.dataloaders(FOLDER / "photos", bs=8, num_workers=0))))


@question
def no_validation_set():
    from fastai.data.core import DataLoaders
    quiet_learner(DataLoaders(loaders(dataset(16), dataset(9)).train))


@question
def empty_validation_set(): quiet_learner(loaders(dataset(16), dataset(0)))


@question
def torch_loaders():
    from fastai.data.core import DataLoaders
    from torch.utils.data import DataLoader
    quiet_learner(DataLoaders(DataLoader(dataset(16), 8), DataLoader(dataset(8), 8)))


@question
def way_out_of_torch_loaders():
    return list(last_row(fitted(dls=loaders(dataset(16), dataset(9), vocab=None))))


# Encoders: names, sizes, and ways out


@question
def width_of_others():
    for arch in ("torchvision/resnet18", "timm/resnet18"): quiet_learner(arch=arch, width=0.5)


@question
def width_of_a_module():
    from torch import nn
    quiet_learner(arch=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), width=0.5)


@question
def width_of_the_command():
    from simclr_nb.cli import pretrain
    from simclr_nb.run.config import RunConfig, complete_config
    small = "--epochs 1 --n-train 64 --n-valid 64 --bs 32 --precision fp32".split()
    assert pretrain(["digits", "--arch", "timm/test_resnet", "--out", "run", *small]) == 0
    complete_config(RunConfig(arch="torchvision/resnet18", width=0.5))


@question
def stem_of_others(): quiet_learner(arch="torchvision/resnet18", stem="cifar")


@question
def blocks_of_others_at_work():
    model = quiet_learner(arch="timm/resnet10t", zero_init_last=False).model.encoder
    return all(bool(m.weight.any()) for m in model.modules() if hasattr(m, "running_mean"))


@question
def timm_transformer_of_another_size():
    from simclr_nb.model.encoder import load_encoder
    dls = simclr_dls(FOLDER / "photos", size=32, bs=8, num_workers=0)
    learn = fitted(dls=dls, arch="timm/vit_tiny_patch16_224", epochs=1)
    path = learn.save_encoder(FOLDER / "vit.safetensors")
    return load_encoder(path).config["size"]


@question
def torchvision_transformer_of_another_size():
    from simclr_nb.model.encoder import create_encoder
    return create_encoder("torchvision/vit_b_16", size=32).out_dim


def cut_encoder():
    from simclr_nb.model.encoder import create_encoder
    return create_encoder("torchvision/resnet18", size=32, layer="layer2").eval()


@question
def torch_script():
    import torch
    from simclr_nb.model.encoder import create_encoder
    x, equal = torch.rand(2, 3, 32, 32), []
    for stem, pool in (("cifar", "torch"), ("imagenet", "same")):
        encoder = create_encoder("resnet18", 1 / 16, stem, pool_padding=pool).eval()
        equal.append(torch.allclose(torch.jit.script(encoder)(x), encoder(x), atol=1e-5))
    return equal


@question
def torch_script_of_others():
    import torch
    torch.jit.script(cut_encoder())


@question
def torch_export_of_a_cut_encoder():
    import torch
    encoder, x = cut_encoder(), torch.rand(2, 3, 32, 32)
    shapes = {"x": {0: torch.export.Dim("n")}}
    exported = torch.export.export(encoder, (x,), dynamic_shapes=shapes).module()
    more = torch.rand(5, 3, 32, 32)
    traced = torch.jit.trace(encoder, x)
    return [torch.allclose(f(more), encoder(more), atol=1e-5) for f in (exported, traced)]


@question
def onnx_of_a_cut_encoder():
    import torch
    from torch.export import Dim
    path = FOLDER / "cut.onnx"
    torch.onnx.export(cut_encoder(), (torch.rand(2, 3, 32, 32),), path, dynamo=True,
                      verbose=False, dynamic_shapes=({0: Dim("n")},))
    return path.stat().st_size > 0


def answer(ask):
    try: return ask()
    except (Exception, SystemExit) as error: return [type(error).__name__, str(error)]


if __name__ == "__main__":
    import torch
    torch.manual_seed(0)
    DIGITS = simclr_dls("digits", bs=32, n_train=128, n_valid=64, seed=0)
    answers = {name: answer(ask) for name, ask in QUESTIONS.items()}
    print("\nANSWERS" + json.dumps(answers))
