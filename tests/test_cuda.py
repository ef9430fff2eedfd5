"""What only a CUDA GPU can show: skipped where there is none."""

import copy
import threading
import warnings

import pytest
import torch
from conftest import length, random_glow, same_trace, stripes, trace_of
from torch.utils.data import DataLoader, TensorDataset

from latent_aug import (
    Glow,
    LatentAdversarial,
    LatentCollate,
    LatentLoader,
    LatentPerturb,
    TrainConfig,
    load_flow,
    train_flow,
)
from latent_aug.flows import bundled_flows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def gpu_model(model):
    return model.cuda()


@pytest.fixture
def gpu_batch(batch):
    return tuple(t.cuda() for t in batch)


@pytest.fixture
def no_waiting():
    """Whatever makes the processor wait for the GPU is an error."""

    def start():
        torch.cuda.synchronize()
        with warnings.catch_warnings():  # it is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["highest", "medium"])
def _precision(request):
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("name", sorted(bundled_flows()))
def test_bundled_flows_are_exact(name):
    flow = load_flow(name)  # stays on the CPU
    x = torch.stack([i.expand(flow.channels, 8, 8) for i in stripes(16)]).repeat(1, 1, 4, 4)
    x = x.cuda() / 255
    z = flow.encode(x)
    assert z.is_cuda
    assert (flow.decode(z) - x).abs().max() < 1e-4
    torch.testing.assert_close(z.cpu(), flow.encode(x.cpu()), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_gradients_are_those_of_the_cpu(dtype):
    flow, z = copy.deepcopy(random_glow(levels=3)), torch.randn(4, 3, 16, 16)
    weights = torch.randn(4, 3, 16, 16)

    def gradient(device, way):
        latents = z.to(device).requires_grad_(True)
        image = flow.decode(latents, gradient=way)
        return torch.autograd.grad((image * weights.to(device)).sum(), latents)[0].cpu()

    expected = gradient("cpu", "fast")
    flow.network_dtype = dtype
    for way in ("fast", "lean"):
        found = gradient("cuda", way)
        assert (found - expected).norm() < (1e-4 if dtype is None else 0.05) * expected.norm()


def graphs_of(flow):
    """How many a flow has recorded."""
    return sum(len(prepared.graphs) for _, _, prepared in flow._prepared.values())


@pytest.fixture(params=[False, True], ids=["launched", "graphs"])
def flow(request):
    flow = random_glow()
    flow.cuda_graphs = request.param
    yield flow
    assert bool(graphs_of(flow)) == request.param


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("where", [None, "cpu", "cuda"])
def test_perturb(flow, gpu_batch, where, no_waiting):
    generator = where and torch.Generator(where).manual_seed(0)
    transform = LatentPerturb(0.25, flow=flow, generator=generator)
    images, labels = gpu_batch
    for _ in range(3):
        transform(images)
    if where != "cpu":  # whose draws are copied
        no_waiting()
    changed, same = transform(images, labels)
    torch.cuda.set_sync_debug_mode("default")
    assert changed.is_cuda
    assert changed.shape == images.shape
    assert (changed - images).abs().amax(dim=(1, 2, 3)).min() > 0.01
    assert same is labels
    assert transform.fallbacks == 0
    assert transform((255 * images).byte()).dtype == torch.uint8


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_attack(flow, gpu_model, gpu_batch, autocast, p, no_waiting):
    attack = LatentAdversarial(gpu_model, flow=flow, eps=2.0, alpha=1.0, p=p)
    images, labels = gpu_batch
    before = trace_of(gpu_model)
    for _ in range(3):
        attack(images, labels)
    no_waiting()
    with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
        changed = attack(images, labels)
    torch.cuda.set_sync_debug_mode("default")
    assert same_trace(before, trace_of(gpu_model))
    with torch.no_grad():
        gpu_model.eval()
        loss = torch.nn.functional.cross_entropy
        assert loss(gpu_model(changed), labels) > loss(gpu_model(images), labels)
        moved = length(flow.encode(changed.clamp(0, 1)) - flow.encode(images), "l2")
        assert moved.max() < 2.1
        assert ((changed != images).flatten(1).any(dim=1).sum()) == round(p * len(images))


class TestLoader:
    def batches(self, seed):
        x = torch.cat([stripes()] * 3, dim=1).repeat(1, 1, 2, 2)
        loader = DataLoader(TensorDataset(x, torch.arange(len(x))), 16, pin_memory=True)
        flow = random_glow()
        perturbed = LatentLoader(loader, LatentPerturb(0.25, flow=flow), device="cuda", seed=seed)
        return x, [tuple(t.clone() for t in batch) for batch in perturbed]

    def test_batches_come_whole_and_in_order(self):
        x, batches = self.batches(seed=1)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert images.is_cuda
        assert labels.tolist() == list(range(len(x)))
        change = (images.cpu().int() - x.int()).abs().flatten(1)
        assert change.amax(dim=1).min() > 0
        assert change.float().mean() < 60

    def test_a_seed_repeats_an_epoch(self):
        (_, one), (_, two), (_, three) = (self.batches(seed) for seed in (1, 1, 2))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, two, strict=True))
        assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(one, three, strict=True))

    def test_a_batch_is_ready_where_it_is_used(self):
        """Though it was made on another stream, and its memory is not reused too early."""
        x = torch.rand(512, 3, 16, 16)
        loader = DataLoader(TensorDataset(x, torch.arange(len(x))), 64)
        flow, seen = random_glow(), []
        flow.cuda_graphs = True
        for images, _ in LatentLoader(loader, LatentPerturb(0.0, flow=flow), device="cuda"):
            work = images.clone()
            for _ in range(20):
                work = work @ torch.eye(16, device="cuda")
            seen.append((work - images).abs().amax())
            seen.append((images.cpu() - x[len(seen) // 2 * 64 :][:64]).abs().amax().cuda())
        assert torch.stack(seen).max() < 1e-3

    def test_collate(self, glow, gpu_batch):
        samples = list(zip(*(t.cpu() for t in gpu_batch), strict=True))
        collate = LatentCollate(LatentPerturb(0.25, flow=glow), device="cuda")
        images, labels = next(iter(DataLoader(samples, 6, collate_fn=collate)))
        assert images.is_cuda
        assert labels.is_cuda


@pytest.mark.parametrize("network_dtype", ["float32", "bfloat16", "auto"])
def test_training(tmp_path, network_dtype):
    config = TrainConfig(
        output=tmp_path,
        steps=150,
        batch_size=16,
        warmup=2,
        lr=5e-3,
        ema=0.9,
        network_dtype=network_dtype,
    )
    untrained, flow = Glow(1, levels=1, steps=2, hidden=8), Glow(1, levels=1, steps=2, hidden=8)
    untrained.initialize(stripes() / 255)
    flow = train_flow(flow, stripes(), config, validation=stripes(20), progress=False)
    x = stripes().cuda() / 255
    assert flow.bits_per_dim(x).mean() < untrained.bits_per_dim(x.cpu()).mean() - 0.5
    assert (flow.decode(flow.encode(x)) - x).abs().max() < 1e-3
    again = load_flow(tmp_path)
    torch.testing.assert_close(again.encode(x), flow.encode(x))
    again = train_flow(Glow(1, levels=1, steps=2, hidden=8), stripes(), config, progress=False)
    torch.testing.assert_close(again.encode(x), flow.encode(x))


class TestGraphs:
    @pytest.fixture
    def flows(self):
        """One flow twice: with graphs and without."""
        flow = random_glow(levels=3, hidden=32)
        recorded = copy.deepcopy(flow)
        recorded.cuda_graphs = True
        yield recorded, flow
        assert graphs_of(recorded)
        assert not graphs_of(flow)

    def gradient(self, flow, z):
        latents = z.clone().requires_grad_(True)
        return torch.autograd.grad(flow.decode(latents).square().sum(), latents)[0]

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
    def test_results_are_the_same(self, flows, dtype):
        recorded, launched = flows
        recorded.encode(torch.rand(2, 3, 16, 16, device="cuda"))  # in another precision
        for flow in flows:
            flow.network_dtype = dtype
        for _ in range(4):
            for count in (1, 5, 64):
                x = torch.rand(count, 3, 32, 32, device="cuda")
                z = recorded.encode(x)
                torch.testing.assert_close(z, launched.encode(x))
                torch.testing.assert_close(recorded.decode(z), launched.decode(z))
                found, expected = self.gradient(recorded, z), self.gradient(launched, z)
                assert (found - expected).norm() < 1e-3 * expected.norm()
        assert graphs_of(recorded) == 9

    def test_gradients_of_several_calls(self, flows):
        z = [torch.randn(4, 3, 16, 16, device="cuda") for _ in range(3)]
        expected = [self.gradient(flows[1], t) for t in z]
        for _ in range(2):
            self.gradient(flows[0], z[0])
        latents = [t.clone().requires_grad_(True) for t in z]
        losses = [flows[0].decode(t).square().sum() for t in latents]
        for place in (2, 0, 1, 2, 0):
            latents[place].grad = None
            losses[place].backward(retain_graph=True)
            torch.testing.assert_close(latents[place].grad, expected[place], rtol=1e-3, atol=1e-4)

    def test_threads_and_streams(self, flows):
        """Each with a stream of its own, at once."""
        recorded, launched = flows
        inputs = [torch.rand(16, 3, 32, 32, device="cuda") for _ in range(4)]
        expected = [launched.encode(x) for x in inputs]
        gradients = [self.gradient(launched, z) for z in expected]
        torch.cuda.synchronize()
        errors = []

        def work(number):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(30):
                    z = recorded.encode(inputs[number])
                    found = self.gradient(recorded, expected[number])
                    errors.append((z - expected[number]).abs().max())
                    errors.append((found - gradients[number]).abs().max())
            stream.synchronize()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 240
        assert torch.stack(errors).max() < 1e-2

    def test_inference_mode(self, flows):
        x = torch.rand(4, 3, 16, 16, device="cuda")
        with torch.inference_mode():
            inside = [flows[0].encode(x) for _ in range(3)]
        outside = flows[0].encode(x)
        assert all(torch.equal(outside, t) for t in inside)
        assert self.gradient(flows[0], outside).isfinite().all()

    def test_inside_a_user_s_own_graph(self, flows):
        x = torch.rand(4, 3, 16, 16, device="cuda")
        for _ in range(3):
            expected = flows[0].encode(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = flows[0].encode(x)
        graph.replay()
        torch.testing.assert_close(z, expected)

    def test_changed_weights(self, flows):
        x = torch.rand(4, 3, 16, 16, device="cuda")
        for _ in range(3):
            flows[0].encode(x)
        for flow in flows:
            with torch.no_grad():
                for parameter in flow.parameters():
                    parameter.add_(0.01)
        for _ in range(3):
            torch.testing.assert_close(flows[0].encode(x), flows[1].encode(x))
            found, expected = (self.gradient(flow, x) for flow in flows)
            assert (found - expected).norm() < 1e-3 * expected.norm()

    def test_forward_derivatives_pass(self, flows):
        x = torch.rand(4, 3, 16, 16, device="cuda")
        for _ in range(3):
            flows[0].encode(x)
        found, expected = (torch.func.jvp(f.encode, (x,), (torch.ones_like(x),)) for f in flows)
        torch.testing.assert_close(found, expected)
