"""Programs for single images, compiled ahead of time: where they run, and where they must not."""

import copy
import pickle
import shutil

import pytest
import torch
from conftest import random_glow
from torch.utils.data import DataLoader

from latent_aug import LatentPerturb, load_flow
from latent_aug.flows import Glow, compiled, prepared
from latent_aug.flows.glow import PROGRAM_TARGET

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="there is no C++ compiler"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The programs of `small_flow` for 8 x 4."""
    path = tmp_path_factory.mktemp("programs")
    flow = small_flow()
    flow.compile_single_images((8, 4), path)
    # Nothing of the tracing stays in it.
    x = torch.rand(1, 1, 4, 8)
    torch.testing.assert_close(flow.encode(x), small_flow().encode(x))
    return path


def small_flow():
    return random_glow(1, levels=1, steps=1)


@pytest.fixture
def runs(monkeypatch):
    """Which programs ran."""
    found = []

    def load(file, load=prepared.load_program):
        program = load(file)
        if program is not None:
            return lambda t: (found.append(file.name.split("-")[0]), program(t))[1]

    def compile_program(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(prepared, "load_program", load)
    monkeypatch.setattr(prepared, "compile_program", compile_program)
    return found


@needs_compiler
def test_single_images_run_by_program_and_equal_the_flow(folder, runs):
    plain, flow = small_flow(), small_flow()
    flow.compile_single_images((8, 4), folder)
    x = torch.rand(1, 1, 8, 4)
    for flow in (flow, pickle.loads(pickle.dumps(flow))):  # noqa: B020
        z = flow.encode(x)
        back = flow.decode(z)
        assert runs == ["encode", "decode"]
        runs.clear()
        torch.testing.assert_close(z, plain.encode(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(back, x, atol=1e-5, rtol=0)


@needs_compiler
def test_a_pickled_transform_keeps_them_and_a_relative_folder(folder, monkeypatch, tmp_path):
    flow = small_flow()
    monkeypatch.chdir(folder.parent)
    flow.compile_single_images((8, 4), folder.name)
    monkeypatch.chdir(tmp_path)
    perturb = pickle.loads(pickle.dumps(LatentPerturb(flow=flow)))
    assert perturb.flow.compiled_sizes == {(8, 4): folder}
    loaded = copy.deepcopy(load_flow("glow-fashionmnist"))
    loaded.loaded_from = load_flow("glow-fashionmnist").loaded_from
    loaded.compiled_sizes[8, 8] = folder
    perturb = pickle.loads(pickle.dumps(LatentPerturb(flow=loaded)))
    assert perturb.flow.compiled_sizes == {(8, 8): folder}


class Programs(torch.utils.data.Dataset):
    """The number of programs that a transform has at hand where an image is perturbed."""

    def __init__(self, perturb):
        self.perturb = perturb

    def __len__(self):
        return 2

    def __getitem__(self, i):
        moved = self.perturb(torch.rand(1, 8, 4))
        assert moved.isfinite().all()
        return len(self.perturb.flow._prepared[PROGRAM_TARGET][2].programs)


@needs_compiler
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_have_the_programs(context, folder):
    flow = small_flow()
    flow.compile_single_images((8, 4), folder)
    data = Programs(LatentPerturb(0.1, flow=flow))
    assert data[0] == 2
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=context)
    assert list(loader) == [2, 2]


@needs_compiler
def test_a_damaged_program_is_left_alone_and_compiled_again(folder, runs, tmp_path):
    flow, x = small_flow(), torch.rand(1, 1, 8, 4)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:1000])
    flow.compiled_sizes[8, 4] = tmp_path
    torch.testing.assert_close(flow.encode(x), small_flow().encode(x))
    assert not runs
    with pytest.raises(AssertionError, match="compiled again"):
        flow.compile_single_images((8, 4), tmp_path)


@needs_compiler
def test_what_torch_traces_or_maps_runs_without_programs(folder, runs):
    flow = small_flow()
    flow.compile_single_images((8, 4), folder)
    x = torch.rand(1, 1, 8, 4)
    expected = flow.encode(x)
    runs.clear()
    with pytest.raises(RuntimeError):  # torch cannot map channels_last
        torch.vmap(flow.encode)(x[None])
    program = torch.export.export(compiled.Program(flow.encode), (x,), strict=False)
    torch.testing.assert_close(program.module()(x), expected, atol=1e-5, rtol=0)
    assert not runs


@needs_compiler
def test_all_else_runs_without_programs(folder, runs):
    flow = small_flow()
    flow.compile_single_images((8, 4), folder)
    flow.encode(torch.rand(2, 1, 8, 4))
    flow.encode(torch.rand(1, 1, 4, 8))
    flow.encode(torch.rand(1, 1, 8, 4, dtype=torch.float64))
    z = torch.randn(1, 1, 8, 4, requires_grad=True)
    flow.decode(z).sum().backward()
    assert z.grad.abs().sum() > 0
    flow.network_dtype = torch.bfloat16
    flow.encode(torch.rand(1, 1, 8, 4))
    assert not runs


@needs_compiler
def test_programs_of_other_weights_do_not_run(folder, runs):
    flow, x = small_flow(), torch.rand(1, 1, 8, 4)
    flow.compile_single_images((8, 4), folder)
    with torch.no_grad():
        for weight in flow.parameters():
            weight.mul_(1.1)
    torch.testing.assert_close(flow.encode(x), flow.encode(x.repeat(2, 1, 1, 1))[:1])
    assert not runs
    flow.load_state_dict(small_flow().state_dict())
    flow.encode(x)
    assert runs == ["encode"]


def test_what_torch_cannot_compile_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no g++")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    flow = small_flow()
    with pytest.raises(RuntimeError, match=r"could not compile the flow \(no g\+\+\)"):
        flow.compile_single_images(8, tmp_path)
    assert not list(tmp_path.iterdir())
    assert not flow.compiled_sizes


def test_a_program_is_named_for_weights_shape_and_machine(tmp_path, monkeypatch):
    def name(direction="encode", side=8, weights="a"):
        return compiled.name_file(tmp_path, direction, torch.Size((1, 3, side, 8)), weights)

    names = {name(), name("decode"), name(side=16), name(weights="b")}
    monkeypatch.setattr(compiled, "describe_machine", lambda: ("another",))
    assert len(names | {name()}) == 5


@pytest.mark.parametrize("size", [0, 2.5, 36, (32, 33), 128, (8, 8, 8)])
def test_bad_sizes_are_refused(size, tmp_path):
    with pytest.raises(ValueError, match="size"):
        load_flow().compile_single_images(size, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_flow_that_learns_is_not_compiled(tmp_path):
    with pytest.raises(ValueError, match="frozen weights"):
        small_flow().requires_grad_(True).compile_single_images(8, tmp_path)
    flow = small_flow()
    flow.network_dtype = torch.bfloat16
    with pytest.raises(ValueError, match="network_dtype must be None"):
        flow.compile_single_images(8, tmp_path)
    with pytest.raises(ValueError, match="untrained"):
        Glow(1, levels=1, steps=1, hidden=4).requires_grad_(False).compile_single_images(
            8, tmp_path
        )
