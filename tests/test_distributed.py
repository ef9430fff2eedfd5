"""Training under DistributedDataParallel with the attack in the step: two gloo processes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import convolutional_classifier, free_port, join_group, random_glow
from torch import nn

from latent_aug import LatentAdversarial

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
