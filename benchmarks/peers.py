"Code that others would write, for benchmarks to compare with."
import random
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

BLOCKS = dict(resnet18=(BasicBlock, [2, 2, 2, 2]), resnet50=(Bottleneck, [3, 4, 6, 3]))


def torchvision_encoder(arch: str, width: float, stem: str = "cifar") -> tuple[nn.Module, int]:
    "torchvision's ResNet with the stem for 32 px, or its own, and no classifier; width of h."
    (block, blocks), channels = BLOCKS[arch], round(64 * width)
    net = ResNet(block, blocks)
    net.inplanes = channels
    dim = 8 * channels * block.expansion
    net.bn1 = nn.BatchNorm2d(channels)
    net.fc = nn.Identity()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    else: net.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
    for i, n in enumerate(blocks):
        stride = 2 if i else 1
        setattr(net, f"layer{i + 1}", net._make_layer(block, channels << i, n, stride))
    return net, dim


def plain_loss(z: Tensor, temperature: float = 0.5) -> Tensor:
    "NT-Xent in its shortest form; rows `i` and `i + N` of z show one image."
    z = F.normalize(z, dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def peer(module: str) -> ModuleType:
    "A module of a library that nothing else needs."
    try: return import_module(module)
    except ImportError as e:
        raise SystemExit(f"{e}: pip install -r benchmarks/requirements.txt") from None


class Transformed(Dataset):
    "Two views of each image by a transform that makes one, or a list of both."

    def __init__(self, images: Sequence, transform: Callable):
        self.images = images
        self.transform = transform

    def __len__(self): return len(self.images)

    def __getitem__(self, i) -> list[Tensor]:
        image = self.images[i]
        if isinstance(image, str): image = Image.open(image).convert("RGB")
        elif self.transform.takes_pillow: image = to_pil_image(image)
        return self.transform(image)


def one_by_one(transform: Callable, images: Sequence, batch: int, workers: int) -> DataLoader:
    "Batches of views that workers make, who stay alive from pass to pass."
    return DataLoader(Transformed(images, transform), batch, shuffle=True, drop_last=True,
                      num_workers=workers, persistent_workers=workers > 0)


class Twice:
    "A transform of one image, called twice."
    takes_pillow = True

    def __init__(self, *steps: Callable, takes_pillow: bool = True):
        self.steps = v2.Compose(steps)
        self.takes_pillow = takes_pillow

    def __call__(self, image) -> list[Tensor]: return [self.steps(image) for _ in range(2)]


def settings(size: int) -> dict:
    "Strength of the colours, and probability of blur: the paper's for ImageNet and for CIFAR-10."
    return dict(strength=0.5, blur=0.0) if size <= 64 else dict(strength=1.0, blur=0.5)


def lightly_views(size: int) -> Callable:
    "lightly's `SimCLRTransform`."
    s = settings(size)
    transform = peer("lightly.transforms").SimCLRTransform(
        input_size=size, cj_prob=0.8, cj_strength=s["strength"], cj_bright=0.8, cj_contrast=0.8,
        cj_sat=0.8, cj_hue=0.2, min_scale=0.08, random_gray_scale=0.2, hf_prob=0.5,
        gaussian_blur=s["blur"], sigmas=(0.1, 2.0), normalize=None)
    transform.takes_pillow = True
    return transform


def solo_views(size: int, other: dict | None = None) -> Twice:
    "The operators of solo-learn's recipe, in its order, by torchvision on Pillow images."
    s = other or settings(size)
    c = 0.8 * s["strength"]
    blur = [RandomGaussian(s["blur"])] if s["blur"] > 0 else []
    return Twice(T.RandomResizedCrop(size, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
                 T.RandomApply([T.ColorJitter(c, c, c, 0.2 * s["strength"])], 0.8),
                 T.RandomGrayscale(0.2), *blur, T.RandomHorizontalFlip(), T.ToTensor())


class RandomGaussian:
    "Pillow's blur with a random radius, for a share of the images."

    def __init__(self, p: float): self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.p: return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def torchvision_views(size: int) -> Twice:
    "torchvision's v2 on 8-bit tensors, image by image: it draws once for all images of a batch."
    s = settings(size)
    c = 0.8 * s["strength"]
    kernel = int(0.1 * size) | 1
    soften = v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], s["blur"])
    blur = [soften] if s["blur"] > 0 else []
    return Twice(v2.ToImage(), v2.RandomResizedCrop(size, (0.08, 1.0), antialias=True),
                 v2.RandomHorizontalFlip(), v2.RandomApply(
                     [v2.ColorJitter(c, c, c, 0.2 * s["strength"])], 0.8),
                 v2.RandomGrayscale(0.2), *blur, v2.ToDtype(torch.float32, scale=True),
                 takes_pillow=False)


def kornia_views(size: int) -> Callable[[Tensor], list[Tensor]]:
    "kornia's operators on batches of floats."
    K = peer("kornia.augmentation")
    s = settings(size)
    c = 0.8 * s["strength"]
    steps = nn.Sequential(
        K.RandomResizedCrop((size, size), (0.08, 1.0)), K.RandomHorizontalFlip(),
        K.ColorJitter(c, c, c, 0.2 * s["strength"], p=0.8), K.RandomGrayscale(p=0.2))
    if s["blur"]: steps.append(K.RandomGaussianBlur((23, 23), (0.1, 2.0), p=s["blur"]))
    return lambda x: [steps(x.float() / 255) for _ in range(2)]
