"""Training under DistributedDataParallel with the attack in the step: two gloo processes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import convolutional_classifier, free_port, join_group, random_glow
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from latent_aug import LatentAdversarial, LatentLoader, LatentPerturb

RANKS, STEPS = 2, 3


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


def train(rank, port, options, results):
    """What each process runs."""
    join_group(rank, port, RANKS)
    torch.set_num_threads(1)
    model = nn.parallel.DistributedDataParallel(undropped(), find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attack, attacked = attack_on(model, rank, options), []
    for batch in batches(rank):
        images, labels = attack.step(batch)
        attacked.append(images)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    results[rank] = (attacked, {k: v.clone() for k, v in model.module.state_dict().items()})
    dist.barrier()
    dist.destroy_process_group()


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


@pytest.mark.parametrize("options", [{}, {"model_mode": "unchanged", "p": 0.5}], ids=str)
def test_two_processes_are_as_one(options):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(
            train, args=(free_port(), options, results), nprocs=RANKS, join=True
        )
        results = dict(results)
    attacked, models = train_in_one_process(options)
    for rank in range(RANKS):
        for ours, expected in zip(results[rank][0], attacked[rank], strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            results[rank][1], dict(models[rank].state_dict()), atol=1e-5, rtol=1e-4
        )
    assert not torch.equal(results[0][0][0], results[1][0][0])


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


def perturb_together(rank, port, results):
    """What each process runs."""
    join_group(rank, port, RANKS)
    torch.set_num_threads(1)
    model = nn.parallel.DistributedDataParallel(convolutional_classifier().eval())
    results[rank] = perturbed_epoch(model)
    dist.barrier()
    dist.destroy_process_group()


def test_loader_and_attack_draw_by_rank_and_say_nothing(monkeypatch):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(
            perturb_together, args=(free_port(), results), nprocs=RANKS, join=True
        )
        results = dict(results)
    for rank in range(RANKS):
        found, perturbing, training = results[rank]
        assert perturbing == 0
        assert training >= len(found)  # it is heard, so silence means something
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(RANKS))
        expected, _, _ = perturbed_epoch(convolutional_classifier().eval())
        for ours, alone in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, alone, atol=1e-4, rtol=0)
    for first, second in zip(results[0][0], results[1][0], strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    everything = [batch for rank in range(RANKS) for batch, _ in results[rank][0]]
    assert len(torch.cat(everything).unique(dim=0)) == len(everything) * 4
