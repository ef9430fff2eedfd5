"""Two gloo processes: training with the attack in the step, and what each of them draws."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import Identity, convolutional_classifier, in_processes, random_glow
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision.transforms import v2

from latent_aug import LatentAdversarial, LatentCollate, LatentLoader, LatentPerturb

RANKS, STEPS = 2, 3
OPTIONS = {"eval": {"p": 0.5}, "unchanged": {"model_mode": "unchanged", "p": 0.5}}


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    return [(torch.rand(4, 3, 16, 16, generator=generator), torch.arange(4)) for _ in range(STEPS)]


def attack_on(model, rank, options):
    generator = torch.Generator().manual_seed(100 + rank)
    return LatentAdversarial(model, flow=random_glow(), steps=2, generator=generator, **options)


def undropped():
    model = convolutional_classifier().train()
    model[3].p = 0.0  # its draws would differ between one process and two
    return model


def train(options):
    """The attack in every step of one process's training: attacked images and weights."""
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(undropped(), find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attack, attacked = attack_on(model, rank, options), []
    for batch in batches(rank):
        images, labels = attack.step(batch)
        attacked.append(images)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return attacked, model.module.state_dict()


def train_in_one_process(options):
    """The same: each rank's attack on its own copy, gradients averaged."""
    models = [undropped() for _ in range(RANKS)]
    attacks = [attack_on(model, rank, options) for rank, model in enumerate(models)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    attacked = [[] for _ in range(RANKS)]
    for step in range(STEPS):
        # DistributedDataParallel gives every forward pass the first rank's buffers.
        first = [buffer.clone() for buffer in models[0].buffers()]
        for rank, model in enumerate(models):
            images, labels = attacks[rank].step(batches(rank)[step])
            attacked[rank].append(images)
            optimizers[rank].zero_grad()
            for buffer, content in zip(model.buffers(), first, strict=True):
                buffer.copy_(content)
            F.cross_entropy(model(images), labels).backward()
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            mean = sum(p.grad for p in parameters) / RANKS
            for parameter in parameters:
                parameter.grad.copy_(mean)
        for optimizer in optimizers:
            optimizer.step()
    return attacked, models


def collectives():
    """How many this process has taken part in."""
    if not dist.is_initialized():
        return 0
    return dist.distributed_c10d._get_default_group()._get_sequence_number_for_group()


def perturbed_epoch(model):
    """Batches from the loader, the same attacked, and collectives there and in training.

    Every process has the same images, and the same seed in its global generator.
    """
    torch.manual_seed(0)
    data = TensorDataset(0.2 + 0.6 * torch.rand(8, 3, 16, 16), torch.arange(8) % 4)
    torch.manual_seed(1)
    flow = random_glow()
    loaders = [
        LatentLoader(DataLoader(data, 4), LatentPerturb(0.3, flow=flow), seed=seed)
        for seed in (5, None)
    ]
    attack = LatentAdversarial(model, flow=flow, steps=2, p=0.5)
    found, perturbing, training = [], 0, 0
    for loader in loaders:
        before = collectives()
        for batch in loader:
            images, labels = attack.step(batch)
            perturbing, before = perturbing + collectives() - before, collectives()
            found.append((batch[0], images))
            F.cross_entropy(model(images), labels).backward()
            training, before = training + collectives() - before, collectives()
    return found, perturbing, training


def draws():
    """What each process draws from the same seed."""
    torch.manual_seed(0)
    perturb, images = LatentPerturb(0.2, flow=Identity()), torch.full((12, 3, 8, 8), 0.5)
    data = TensorDataset(images, torch.arange(12))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    attack = LatentAdversarial(
        model, flow=Identity(), steps=1, p=0.5, alpha=0.0, eps=0.1, norm="linf"
    )
    workers = DataLoader(
        data,
        2,
        sampler=DistributedSampler(data, shuffle=False),
        num_workers=1,
        collate_fn=LatentCollate(perturb),
    )
    return {
        "transform": perturb(images[:2]),
        "attack": attack(images[:2], torch.tensor([0, 1])),
        "loader": next(iter(LatentLoader(DataLoader(data, 4), perturb)))[0],
        "torchvision's": next(iter(LatentLoader(DataLoader(data, 4), v2.GaussianNoise())))[0],
        "workers": next(iter(workers))[0],
        "user's": torch.rand(3),
    }


def attack_sharded():
    """Shares and changed images of a sharded model, which has all right in the first process only.

    Each pass of one process waits for the other's.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 768))
        model[1].bias.copy_(torch.tensor([384.0, -384.0]))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    attack, found = LatentAdversarial(model, flow=random_glow()), []
    brighter = torch.arange(8) % 2
    images = (0.25 + 0.5 * brighter)[:, None, None, None].expand(8, 3, 16, 16).contiguous()
    for _ in range(4):
        attacked = attack(images, (brighter + dist.get_rank()) % 2)
        found.append((attack.share, int((attacked != images).flatten(1).any(1).sum())))
    return found


def attack_wrapped():
    """Collectives of attacks that only the first process makes, on models wrapped elsewhere.

    The parts of the one are wrapped, the other is called by `forward`.
    """
    wrap = nn.parallel.DistributedDataParallel
    body, head = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), nn.Linear(768, 4)
    parts, whole = nn.Sequential(wrap(body), wrap(head)), wrap(nn.Sequential(body, head))
    (images, labels), found = batches(0)[0], []
    share = float(dist.get_rank() == 0)
    for model, options in ((parts, {}), (whole, {"forward": lambda _, batch: whole(batch[0])})):
        attack, before = attack_on(model, 0, {"p": share, **options}), collectives()
        changed = not torch.equal(attack(images, labels), images)
        found.append((changed, collectives() - before))
    kept = all(m.broadcast_buffers and m.require_backward_grad_sync for m in (*parts, whole))
    before = collectives()
    parts(images).sum().backward()
    return found, kept, collectives() - before


def everything():
    """What each process runs, in one go: its start takes longest."""
    model = nn.parallel.DistributedDataParallel(convolutional_classifier().eval())
    return {
        "trained": {name: train(options) for name, options in OPTIONS.items()},
        "perturbed": perturbed_epoch(model),
        "drawn": draws(),
        "sharded": attack_sharded(),
        "wrapped": attack_wrapped(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found."""
    return in_processes(everything, tmp_path_factory.mktemp("distributed"), count=RANKS)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_train_as_one(found, name):
    attacked, models = train_in_one_process(OPTIONS[name])
    for rank in range(RANKS):
        images, weights = found[rank]["trained"][name]
        torch.testing.assert_close(images, attacked[rank], atol=1e-4, rtol=0)
        torch.testing.assert_close(weights, dict(models[rank].state_dict()), atol=1e-5, rtol=1e-4)
    assert not torch.equal(*(found[rank]["trained"][name][0][0] for rank in range(RANKS)))


def test_loader_and_attack_draw_by_rank_and_say_nothing(found, monkeypatch):
    for rank in range(RANKS):
        batches, perturbing, training = found[rank]["perturbed"]
        assert perturbing == 0
        assert training >= len(batches)  # it is heard, so silence means something
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(RANKS))
        alone, _, _ = perturbed_epoch(convolutional_classifier().eval())
        torch.testing.assert_close(batches, alone, atol=1e-4, rtol=0)
    first, second = (found[rank]["perturbed"][0] for rank in range(RANKS))
    for ours, theirs in zip(first, second, strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    images = torch.cat([batch for batch, _ in first + second])
    assert len(images.unique(dim=0)) == len(images)


def test_a_process_that_attacks_alone_says_nothing_however_the_model_is_wrapped(found):
    for rank in range(RANKS):
        attacks, kept, training = found[rank]["wrapped"]
        assert attacks == [(rank == 0, 0)] * 2
        assert kept
        assert training > 0


def test_ranks_of_one_seed_draw_differently(found):
    first, second = (found[rank]["drawn"] for rank in range(RANKS))
    different = {name for name in first if not torch.equal(first[name], second[name])}
    assert different == {"transform", "attack", "loader", "torchvision's", "workers"}


def test_a_sharded_model_is_passed_equally_often_where_shares_differ(found):
    first, second = (found[rank]["sharded"] for rank in range(RANKS))
    assert all(share > 0 for share, _ in first)
    assert any(count > 0 for _, count in first)
    assert second == [(0.0, 0)] * 4
