"""`--cache`: encodings computed once, equal bits with and without, nothing corrupt after a kill."""

import os
import signal

import pytest
import torch

from calib.data.encoding_cache import cached, digest_of, key_of, read_lengths, write_lengths
from calib.data.option import open_data
from tests.tiny import data as tinydata
from tests.tiny.pipeline import build_pipeline, tiny_transformer

SETTINGS = {
    "height": 16,
    "width": 16,
    "num_inference_steps": 5,
    "guidance_scale": 3.5,
    "max_sequence_length": 16,
}


@pytest.fixture
def pipe():
    return build_pipeline()


def batches(pipe, how, cache=None, seed=0, **options):
    options = {"log": lambda text: None} | options
    return open_data(str(how), lambda: SETTINGS, cache=cache, **options).batches(pipe, seed)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def files(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def forbid(*modules):
    def fail(*args, **options):
        raise AssertionError("an encoder ran")

    for module in modules:
        module.forward = fail
        if hasattr(module, "encode"):
            module.encode = fail


@pytest.mark.parametrize("kind", ["folder", "prompts"])
def test_the_same_bits_with_and_without_and_no_second_encoding(pipe, tmp_path, kind):
    how = getattr(tinydata, kind)(tmp_path / "set.txt")
    plain = [batches(pipe, how)(step, 3) for step in range(3)]
    cache = tmp_path / "cache"
    first = [batches(pipe, how, cache)(step, 3) for step in range(3)]
    before = files(cache)
    # Half of a batch from the cache: an encoding depends on its own sample alone.
    before[0].unlink()
    again = [batches(pipe, how, cache)(step, 3) for step in range(3)]
    for row in zip(plain, first, again):
        assert equal(row[0], row[1]) and equal(row[0], row[2])
    assert files(cache) == before
    warm = build_pipeline()
    forbid(warm.vae, warm.text_encoder, warm.text_encoder_2, warm.transformer)
    assert equal(batches(warm, how, cache)(1, 3), plain[1])


def test_keys_hold_encoder_sample_and_size(pipe, tmp_path):
    how, cache = tinydata.folder(tmp_path / "set", 2), tmp_path / "cache"
    batches(pipe, how, cache)(0, 2)
    assert len(files(cache)) == 4
    batches(pipe, how, cache, size=32)(0, 2)  # other latents, the same texts
    assert len(files(cache)) == 6
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1
    batches(pipe, how, cache)(0, 2)
    assert len(files(cache)) == 8
    with torch.no_grad():
        next(pipe.text_encoder.parameters())[0, 0] += 1
    batches(pipe, how, cache)(0, 2)
    assert len(files(cache)) == 10
    for path in (how / "000.png", how / "001.png"):  # renamed pictures are the same pictures
        path.rename(path.with_stem("x" + path.stem))
        path.with_suffix(".txt").rename(path.with_stem("x" + path.stem).with_suffix(".txt"))
    batches(pipe, how, cache)(0, 2)
    assert len(files(cache)) == 10


def test_digests():
    model = tiny_transformer()
    before = digest_of(model)
    assert digest_of(tiny_transformer()) == before
    assert digest_of(tiny_transformer(dtype=torch.bfloat16)) != before
    with torch.no_grad():
        list(model.parameters())[-1].view(-1)[-1] += 1e-3
    assert digest_of(model) != before
    assert key_of("ab", "c") != key_of("a", "bc") != key_of("a", b"bc", "")


def test_a_damaged_file_is_told_and_computed_again(pipe, tmp_path):
    how, cache, told = tinydata.folder(tmp_path / "set", 3), tmp_path / "cache", []
    whole = batches(pipe, how, cache)(0, 3)
    for path in files(cache):
        path.write_bytes(path.read_bytes()[:-9])
    assert equal(batches(pipe, how, cache, log=told.append)(0, 3), whole)
    assert len(told) == 6 and all("is damaged" in line for line in told)
    assert equal(batches(pipe, how, cache, log=told.append)(0, 3), whole) and len(told) == 6


def test_a_killed_run_leaves_nothing_corrupt(pipe, tmp_path):
    how, cache = tinydata.folder(tmp_path / "set"), tmp_path / "cache"
    child = os.fork()
    if child == 0:
        real, count = os.replace, 0

        def replace(source, target):
            nonlocal count
            count += 1
            if count == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        os.replace = replace
        batches(pipe, how, cache)(0, 8)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = files(cache)
    assert [path.suffix for path in left].count(".safetensors") == 5
    assert [path.name[0] for path in left if path.suffix == ".tmp"] == ["."]
    told = []
    assert equal(batches(pipe, how, cache, log=told.append)(0, 8), batches(pipe, how)(0, 8))
    assert not told


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cached(None, "x", lambda: "never", lambda: {"a": torch.ones(2)})["a"].sum() == 2
    write_lengths(None, "abc", {"x": 1})
    assert files(tmp_path) == [] and read_lengths(None, "abc") == {}


def test_lengths_of_shards_are_kept(pipe, tmp_path):
    pattern, cache = tinydata.shards(tmp_path / "set"), tmp_path / "cache"
    batches(pipe, pattern, cache, window=1)(0, 12)
    [path] = (cache / "lengths").iterdir()
    found = read_lengths(cache, path.stem)
    assert len(found) >= 2 and set(found.values()) <= {5, 2}
