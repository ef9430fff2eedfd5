"""Checkpoints that were damaged or made to harm: an error that says so, or the same flow."""

import json
import random
import resource
import shutil
import struct
import time

import pytest
import torch
from conftest import random_dense, random_glow

from latent_aug import load_flow

SEED = 20211011
MUTATIONS = 500  # of each flow
TOKENS = ("0", "-1", "1e400", "NaN", "null", "[]", "{}", '"x"', "99999999999999999999", "true")
DTYPES = ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F99")


@pytest.fixture(scope="module", params=["glow", "conditional-dense"])
def good(request, tmp_path_factory):
    """A small flow's files, and what it gives."""
    directory = tmp_path_factory.mktemp("good")
    small = {"glow": lambda: random_glow(levels=1, steps=1, hidden=4)}
    flow = small.get(request.param, lambda: random_dense(1, 3))()
    flow.save_pretrained(directory)
    return directory, flow


def header_of(data):
    """A safetensors file's header and the rest."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, rest):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def flip_bits(draw, data):
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 8, 100))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def truncate(draw, data):
    return data[: draw.randrange(len(data))]


def extend(draw, data):
    return data + draw.randbytes(draw.choice((1, 100, 10_000)))


def oversize(draw, data):
    length = draw.choice((0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1, 100_000_001))
    return struct.pack("<Q", length) + data[8:]


def change_a_tensor(draw, data):
    header, rest = header_of(data)
    entry = header[draw.choice(list(header))]
    shape = entry.get("shape", [])  # the metadata has none
    match draw.randrange(4):
        case 0:
            entry["dtype"] = draw.choice(DTYPES)
        case 1:
            entry["shape"] = draw.choice(
                ([], [0], [-1], [2**62, 4], [2**31, 2**31], shape[::-1], [1.5])
            )
        case 2:
            entry["data_offsets"] = draw.choice(([0, 0], [0, 2**60], [-8, 8], [8, 0], [0], "x"))
        case 3:
            entry["shape"] = [*shape, 1]
    return with_header(header, rest)


def rename_a_tensor(draw, data):
    header, rest = header_of(data)
    name = draw.choice(list(header))
    new = draw.choice(("", "../../etc/passwd", "a\x00b", "/", "x" * 10_000, "__class__", "é"))
    header = {new if key == name else key: value for key, value in header.items()}
    return with_header(header, rest)


def not_a_number(draw, data):
    data = bytearray(data)
    _, rest = header_of(bytes(data))
    first = len(data) - len(rest)
    place = first + 4 * draw.randrange(len(rest) // 4)
    value = draw.choice((float("nan"), float("inf"), -float("inf")))
    data[place : place + 4] = struct.pack("<f", value)
    return bytes(data)


def deepen(draw, data):
    _, rest = header_of(data)
    depth = draw.choice((100, 10_000, 200_000))
    return with_header(b'{"a":' * depth + b"1" + b"}" * depth, rest)


def change_the_config(draw, text):
    config = json.loads(text)
    key = draw.choice(list(config))
    match draw.randrange(4):
        case 0:
            return text.replace(json.dumps(config[key]).encode(), draw.choice(TOKENS).encode())
        case 1:
            config.pop(key)
        case 2:
            config[draw.choice(("extra", "__init__", key + " "))] = 1
        case 3:
            config[key] = draw.choice((0, -1, 2, 3, 10**6, 10**30, 1.5, "8", [8], {"a": {}}))
    return json.dumps(config).encode()


WEIGHTS = (
    flip_bits,
    truncate,
    extend,
    oversize,
    change_a_tensor,
    rename_a_tensor,
    not_a_number,
    deepen,
)
CONFIG = (flip_bits, truncate, extend, change_the_config, change_the_config)


def equal(loaded, flow):
    """Whether they are the same flow: one architecture, weight for weight."""
    ours, theirs = loaded.state_dict(), flow.state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    return same and loaded.config == flow.config


def test_a_thousand_mutations(good, tmp_path):
    directory, flow = good
    draw, accepted, refused, silent = random.Random(SEED), [], 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(MUTATIONS):
        target = tmp_path / "mutated"
        shutil.copytree(directory, target)
        name = draw.choice(("model.safetensors", "model.safetensors", "config.json"))
        mutation = draw.choice(WEIGHTS if name == "model.safetensors" else CONFIG)
        path = target / name
        path.write_bytes(mutation(draw, path.read_bytes()))
        started = time.process_time()  # a busy machine has no say
        try:
            loaded = load_flow(target)
        except (ValueError, OSError) as error:
            silent += not str(error)
            refused += 1
        else:
            accepted.append((number, mutation.__name__, name, equal(loaded, flow)))
        assert time.process_time() - started < 20, f"mutation {number}, {mutation.__name__}"
        shutil.rmtree(target)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, f"{grown} KiB more"
    assert refused > 0.6 * MUTATIONS
    assert silent == 0
    assert [found for found in accepted if not found[-1]] == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_are_no_files(good, tmp_path, name):
    target = tmp_path / "flow"
    shutil.copytree(good[0], target)
    (target / name).unlink()
    (target / name).symlink_to(target / name)  # to itself
    with pytest.raises(OSError, match=name.split(".")[0]):
        load_flow(target)
    (target / name).unlink()
    (target / name).mkdir()
    with pytest.raises((OSError, ValueError)):
        load_flow(target)


@pytest.mark.parametrize("name", ["../flow", "a/../b", "a//b", "org/..", "org/\x00", "", "a\nb/c"])
def test_names_that_climb(name):
    with pytest.raises((ValueError, OSError)):
        load_flow(name)
