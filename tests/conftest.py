"""Fixtures and tables that every test module shares."""

import copy
import datetime
import os

from hub_server import Hub

HUB = Hub()
os.environ["HF_ENDPOINT"] = HUB.url  # read when the hub's client is imported: none knows another
os.environ["HF_HUB_DISABLE_XET"] = "1"

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from latent_aug import Flow, Glow, LatentAdversarial
from latent_aug.flows import ConditionalDenseFlow


class Identity(Flow):
    """The flow that does nothing: latents are pixels."""

    channels = 3

    def encode(self, x, y=None):
        return x

    def decode(self, z, y=None):
        return z


class Grey(torch.utils.data.Dataset):
    """Always the same image through a transform, so that what differs comes from that."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.transform(torch.full((3, 8, 8), 0.5))


class ByClass(Flow):
    """A conditional flow: each class has its own mean and scale of the pixels."""

    channels, num_classes = 3, 4

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.0, 0.2, 0.4, 0.6]))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 4.0, 8.0]))

    def of(self, y):
        weights = y if y.is_floating_point() else nn.functional.one_hot(y, 4).to(self.mean)
        return ((weights @ t)[:, None, None, None] for t in (self.mean, self.scale))

    def encode(self, x, y=None):
        mean, scale = self.of(y)
        return (x - mean) / scale

    def decode(self, z, y=None):
        mean, scale = self.of(y)
        return z * scale + mean


def random_glow(channels=3, *, levels=2, steps=2, hidden=8, dtype=torch.float32, seed=0):
    """A small Glow none of whose parts is the identity, as after training."""
    torch.manual_seed(seed)
    flow = Glow(channels, levels=levels, steps=steps, hidden=hidden).to(dtype)
    flow.initialize(torch.rand(16, channels, 16, 16, dtype=dtype))
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "q0" in name or "net.4" in name:  # priors and last convolutions start at zero
                parameter.normal_(std=0.1)
    return flow.requires_grad_(False).eval()


def random_dense(channels=3, side=16, *, classes=4, seed=0):
    """A small class-conditional flow of fully connected couplings."""
    torch.manual_seed(seed)
    flow = ConditionalDenseFlow(
        channels, side, side, num_classes=classes, steps=3, hidden=8, seed=seed
    )
    return flow.requires_grad_(False).eval()


def images_and_classes(flow, count, height=16, width=16):
    """Images that a flow maps, and their classes where it needs some."""
    height, width = flow.size or (height, width)
    x = torch.rand(count, flow.channels, height, width)
    return x, torch.arange(count) % flow.num_classes if flow.num_classes else None


def stripes(count=96):
    """Images with something to learn: smooth stripes of random phase."""
    phase = torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    wave = torch.sin(torch.arange(8)[None, None, None] / 2 + 6 * phase) / 2 + 0.5
    return (wave.expand(count, 1, 8, 8) * 255).round().byte()


def convolutional_classifier():
    """A convolutional classifier with all that an attack could disturb."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def length(t, norm):
    """The size of each sample, in the unit of a norm's eps."""
    flat = t.flatten(1)
    if norm == "linf":
        return flat.abs().amax(dim=1)
    return flat.norm(dim=1) / (flat.shape[1] ** 0.5 if norm == "rms" else 1)


def trace_of(model):
    """Everything of a model that an attack must not change."""
    return {
        "modes": [module.training for module in model.modules()],
        "state": copy.deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
    }


def same_trace(a, b):
    """Whether two traces are equal."""
    tensors = zip(
        [*a["state"].values(), *a["grads"]], [*b["state"].values(), *b["grads"]], strict=True
    )
    equal = all((x is None and y is None) or torch.equal(x, y) for x, y in tensors)
    return equal and all(a[k] == b[k] for k in ("modes", "flags", "buffers"))


def in_processes(function, folder, *, count=2):
    """What a function returns in each of several processes that talk by gloo."""
    torch.multiprocessing.spawn(join_and_call, (function, str(folder), count), nprocs=count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def join_and_call(rank, function, folder, count):
    """What each of them runs; a lost one is an error after a minute."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting-place",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.save(function(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# One line here puts a new flow through every test of the contract.
FLOWS = {
    "identity": Identity,
    "glow-1-level": lambda: random_glow(levels=1),
    "glow-2-levels": random_glow,
    "glow-3-levels": lambda: random_glow(levels=3),
    "conditional-dense": random_dense,
}


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu(request):
    """Also where there is a GPU, but for the tests that need one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_cuda":
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for other processes
        yield


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=FLOWS)
def any_flow(request):
    return FLOWS[request.param]()


@pytest.fixture(scope="session")
def glow():
    return random_glow()


@pytest.fixture(scope="session")
def grey_glow():
    return random_glow(1)


@pytest.fixture
def model():
    return convolutional_classifier()


@pytest.fixture
def batch():
    # farther than eps from 0 and 1, where clamping plays no part
    return 0.4 + 0.2 * torch.rand(6, 3, 16, 16), torch.randint(4, (6,))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An ImageFolder of two classes, with things in it that are not images."""
    root = tmp_path_factory.mktemp("folder") / "images"
    for index, image in enumerate(stripes(24)):
        place = root / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(place / f"{index:03}.png")
    (root / "readme.txt").write_text("no image")
    (root / ".hidden.png").write_text("no image")
    return root


def paper_attack(model, **arguments):
    """The attack at the paper's setting for CIFAR-10, but for the arguments."""
    paper = {"eps": 1.0, "alpha": 0.5, "steps": 3, "p": 1.0, "labels": "true"}
    return LatentAdversarial(model, **paper | arguments)
