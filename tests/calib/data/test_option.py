"""Every kind of `--data`: the same samples whatever they lie in, and sentences for what is none."""

import dataclasses
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from calib.data.option import open_data, open_source
from calib.data.pixels import pixels
from calib.data.samples import Unreadable, feed
from calib.data.source import Damaged
from calib.data.webdataset import expand
from d2m.families.latents import packed_latents
from tests.tiny import data as tinydata
from tests.tiny.pipeline import build_pipeline

SETTINGS = {
    "height": 16,
    "width": 16,
    "num_inference_steps": 5,
    "guidance_scale": 3.5,
    "max_sequence_length": 16,
}
KINDS = {
    "folder": tinydata.folder,
    "listed": tinydata.listed,
    "shards": tinydata.shards,
    "parquet": tinydata.parquet,
}


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory):
    """What `--data` is, for every kind with pictures."""
    if request.param == "parquet":
        pytest.importorskip("datasets", reason="the extra data is not installed")
    return str(KINDS[request.param](tmp_path_factory.mktemp("data") / "set"))


def data_of(how, **options):
    return open_data(str(how), lambda: SETTINGS, **({"log": lambda text: None} | options))


def read_all(source):
    return [sample.read() for shard in source.shards for sample in source.rows(shard, 0)]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_sample_comes_with_its_caption(place):
    expected = [(tinydata.png(i), tinydata.CAPTIONS[i]) for i in range(12)]
    source = open_source(place)
    assert sorted(read_all(source)) == sorted(expected)
    assert sum(source.length(shard) for shard in source.shards) == 12
    last = source.shards[-1]
    rows = [sample.key for sample in source.rows(last, 0)]
    assert [sample.key for sample in source.rows(last, len(rows) - 1)] == rows[-1:]
    assert len({s.key for shard in source.shards for s in source.rows(shard, 0)}) == 12


def test_batches_are_pure_in_seed_and_step_and_an_epoch_has_every_sample(pipe, place):
    make = data_of(place, window=5).batches
    first = make(pipe, 1)
    four = [first(step, 4) for step in range(4)]
    assert equal(make(pipe, 1)(2, 4), four[2])  # as a resumed run asks
    assert equal(first(1, 4), four[1])
    assert not equal(make(pipe, 2)(0, 4), four[0])
    latents = torch.cat([batch["latents"] for batch in four[:3]]).flatten(1)
    assert len(torch.unique(latents, dim=0)) == 12
    assert {name: tuple(t.shape) for name, t in four[0].items()} == {
        "latents": (4, 16, 16),
        "encoder_hidden_states": (4, 16, 32),
        "pooled_projections": (4, 32),
        "img_ids": (16, 3),
        "txt_ids": (16, 3),
    }


def test_pipeline_draws_from_the_same_conditions(pipe, place):
    """Every latent is that of a picture, beside the text that FluxPipeline makes of its caption."""
    batch = data_of(place).batches(pipe, 0)(0, 12)
    found = set()
    for i in range(12):
        image = torch.from_numpy(pixels(tinydata.png(i), 16, 16))
        with torch.no_grad():
            latents = packed_latents(pipe, image[None])[0]
            states, pooled, ids = pipe.encode_prompt(
                [tinydata.CAPTIONS[i]], None, max_sequence_length=16
            )
        [row] = [r for r in range(12) if torch.equal(batch["latents"][r], latents)]
        assert torch.equal(batch["encoder_hidden_states"][row], states[0])
        assert torch.equal(batch["pooled_projections"][row], pooled[0])
        found.add(row)
    assert len(found) == 12 and torch.equal(batch["txt_ids"], ids)
    _, expected = pipe.prepare_latents(
        1, 4, 16, 16, torch.float32, torch.device("cpu"), torch.Generator()
    )
    assert torch.equal(batch["img_ids"], expected)


# ---------------------------------------------------------------- damaged samples


def damaged(path: Path) -> Path:
    """12 samples: a picture is cut off, one is none, a caption is missing, one is empty."""
    tinydata.folder(path)
    (path / "001.png").write_bytes(tinydata.png(1)[:200])
    (path / "004.png").write_bytes(b"this is no picture")
    (path / "007.txt").unlink()
    (path / "010.txt").write_text("  \n")
    return path


def test_damaged_samples_are_counted_and_left_out(pipe, tmp_path):
    path, told = damaged(tmp_path / "set"), []
    data = data_of(path, skip=4, log=told.append)
    batches = data.batches(pipe, 0)
    steps = [batches(step, 4) for step in range(6)]
    assert all(len(batch["latents"]) == 4 for batch in steps)
    assert data.facts() == {"source": str(path), "left_out": 4}  # each once, in two epochs
    assert len(told) == 3 and all(line.startswith("skipped: ") for line in told)
    # The place of one that is left out is taken by one that depends on the step alone.
    again = data_of(path, skip=4).batches(pipe, 0)
    assert equal(again(4, 4), steps[4]) and equal(again(2, 4), steps[2])
    data.batches(pipe, 5)(0, 12)
    assert data.facts()["left_out"] == 4


def test_too_many_damaged_samples_end_the_run_in_one_sentence(pipe, tmp_path):
    data = data_of(damaged(tmp_path / "set"), skip=3)
    with pytest.raises(ValueError) as caught:
        data.batches(pipe, 0)(0, 12)
    sentence = str(caught.value)
    assert "4 samples of" in sentence and "--skip 3" in sentence and "repair or remove" in sentence
    with pytest.raises(ValueError, match="--skip is -1"):
        data_of(tmp_path / "set", skip=-1)


def test_where_none_can_be_read_the_run_ends(pipe, tmp_path):
    """Counted by samples, not by how often each was tried; a folder without captions says so."""
    tinydata.folder(tmp_path / "set", 3)
    for path in (tmp_path / "set").glob("*.txt"):
        path.unlink()
    words = r": 0 of 3 samples can be read \(.*: 00\d.png: there is no caption, .* in 00\d.txt\)"
    with pytest.raises(ValueError, match=words):
        data_of(tmp_path / "set", skip=100).batches(pipe, 0)(0, 2)
    for path in (tmp_path / "set").glob("*.png"):
        path.write_bytes(b"nothing")
        path.with_suffix(".txt").write_text("a ring")
    with pytest.raises(ValueError, match="0 of 3 samples can be read .*no whole picture"):
        data_of(tmp_path / "set", skip=100).batches(pipe, 0)(0, 2)


def test_an_error_of_ours_is_no_damaged_sample(tmp_path):
    def decode(epoch, data, caption):
        raise OSError("no space left on device")

    source = open_source(str(tinydata.folder(tmp_path / "set")))
    unreadable = Unreadable("set", 100)
    with pytest.raises(OSError, match="no space left"):
        feed(source, 0, 4, {}, unreadable, decode)(0, 1)
    assert not unreadable.reasons


@pytest.mark.parametrize(("cut", "whole"), [(300, 0), (700, 0), (9999, 2), (12_288, 3)])
def test_a_shard_that_ends_too_early(tmp_path, cut, whole):
    """What stands before the end is read; what is lost is at least one sample that is counted."""
    path = Path(tinydata.shards(tmp_path / "set", 12, 12).replace("{000..000}", "000"))
    path.write_bytes(path.read_bytes()[:cut])  # a sample has 4,096 bytes
    rows = list(open_source(str(path)).rows(str(path), 0))
    for i in range(whole):
        assert rows[i].read() == (tinydata.png(i), tinydata.CAPTIONS[i])
    for sample in rows[whole:]:
        with pytest.raises((OSError, ValueError)):
            sample.read()
    assert len(rows) > whole or cut == 12_288  # cut between two samples, nothing tells


def test_rows_of_metadata_that_are_none(tmp_path):
    path = tinydata.listed(tmp_path / "set", 3)
    (tmp_path / "secret.png").write_bytes(tinydata.png(5))
    with open(path / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "../secret.png", "text": "x"}\n')
        file.write('{"file_name": "/etc/passwd", "text": "x"}\n')
        file.write('not json\n[1]\n{"text": "x"}\n{"file_name": "none.png", "text": "x"}\n')
    source, reasons = open_source(str(path)), []
    for shard in source.shards[3:]:
        [sample] = source.rows(shard, 0)
        with pytest.raises((OSError, ValueError)) as caught:
            sample.read()
        reasons.append(str(caught.value))
    assert "outside" in reasons[0] and "outside" in reasons[1] and "object" in reasons[3]
    assert "names no file" in reasons[4] and len(reasons) == 6


def test_tars_give_no_file_but_plain_ones(tmp_path):
    """Links are passed over, pickles are bytes that nothing opens."""
    path = tmp_path / "a.tar"
    pickled = {"b.pkl": b"\x80\x04.", "b.txt": b"y"}
    tinydata.tar(path, {"a.png": tinydata.png(0), "a.txt": b"x"} | pickled)
    with tarfile.open(path, "a") as archive:
        for name, kind in (("c.png", tarfile.SYMTYPE), ("c.txt", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    first, second = open_source(str(path)).rows(str(path), 0)
    assert first.read() == (tinydata.png(0), "x")
    with pytest.raises(ValueError, match=r"no picture, only \.pkl, \.txt"):
        second.read()


def test_brace_patterns():
    assert expand("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand("plain.tar") == ["plain.tar"]


def test_patterns_name_the_same_shards(tmp_path):
    braces = tinydata.shards(tmp_path / "set")
    for pattern in (str(tmp_path / "set"), str(tmp_path / "set/train-*.tar")):
        assert open_source(pattern).shards == open_source(braces).shards
    assert len(open_source(str(tmp_path / "set/train-001.tar")).shards) == 1


def test_columns_are_named_by_hand(tmp_path):
    pytest.importorskip("datasets", reason="the extra data is not installed")
    import datasets

    row = {"first": [tinydata.png(0)], "second": [tinydata.png(1)], "de": ["ein"], "en": ["a"]}
    (tmp_path / "set").mkdir()
    made = datasets.Dataset.from_dict(row)
    made.to_parquet(tmp_path / "set/x.parquet")
    with pytest.raises(ValueError, match="it has first, second, de, en: name two of them"):
        open_source(str(tmp_path / "set"))
    source = open_source(str(tmp_path / "set"), ("second", "en"))
    assert read_all(source) == [(tinydata.png(1), "a")]
    with pytest.raises(ValueError, match="no column 'fr'"):
        open_source(str(tmp_path / "set"), ("second", "fr"))
    made.save_to_disk(tmp_path / "saved")
    assert read_all(open_source(str(tmp_path / "saved"), ("first", "de"))) == [
        (tinydata.png(0), "ein")
    ]
    tinydata.tar(tmp_path / "a.tar", {"0.in.png": tinydata.png(0), "0.out.png": tinydata.png(1),
                                      "0.de.txt": b"ein", "0.txt": b"a"})  # fmt: skip
    assert read_all(open_source(str(tmp_path / "a.tar"), ("out.png", "de.txt"))) == [
        (tinydata.png(1), "ein")
    ]


# ---------------------------------------------------------------- pictures


def test_pictures_of_any_kind_come_out_alike(tmp_path):
    import io

    def file(image, kind, **options):
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    red = Image.new("RGB", (90, 50), (255, 0, 0))
    for image, kind in ((red, "PNG"), (red, "JPEG"), (red, "WEBP"), (red.convert("P"), "GIF")):
        found = pixels(file(image, kind), 8, 16)
        assert found.shape == (8, 16, 3) and abs(found.astype(int) - [254, 0, 0]).max() <= 3
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert (pixels(file(clear, "PNG"), 4, 4) == 255).all()  # transparency is white
    grey = Image.new("I;16", (20, 20), 0)
    assert (pixels(file(grey, "PNG"), 4, 4) == 0).all()
    half = Image.new("RGB", (20, 40), (0, 0, 255))
    half.paste((0, 255, 0), (0, 0, 20, 20))
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    upright, flipped = (pixels(file(half, "PNG", **o), 8, 8) for o in ({}, {"exif": turned}))
    assert (upright[0, 0] == [0, 255, 0]).all() and (flipped[0, 0] == [0, 0, 255]).all()


def test_no_pictures():
    for data in (b"", b"x" * 100, tinydata.png(0)[:100], b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(Damaged):
            pixels(data, 8, 8)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("how", "options", "words"),
    [
        ("nothing/here", {}, "nothing/here cannot be opened as a dataset"),
        ("./nothing", {}, "'./nothing', which is not there"),
        ("empty", {}, "holds no picture"),
        ("empty.txt", {}, "holds no prompt"),
        ("latin.txt", {}, "is not UTF-8"),
        ("set/train-{000..001}.tar", {}, "set/train-000.tar of .* is missing"),
        ("a.tar.gz", {}, "no .tar file"),
        ("*.tar", {}, "no file matches"),
        ("file.bin", {}, "of no known kind"),
        ("prompts.txt", {"columns": "a"}, "--columns is 'a', expected two names"),
        ("prompts.txt", {"window": 0}, "--shuffle is 0"),
        ("prompts.txt", {"size": 0}, "--size is 0"),
        ("prompts.txt", {"cache": "file.bin"}, "--cache is 'file.bin', a file"),
        ("shapes", {"cache": "x"}, "--cache is 'x', but shapes"),
        ("shapes", {"size": 16}, "--size is '16', but shapes"),
    ],
)
def test_refusals(how, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if how == "nothing/here":  # no such folder: a name on the hub, which nobody shall ask
        pytest.importorskip("datasets", reason="the extra data is not installed")
        for module in ("huggingface_hub.constants", "datasets.config"):
            monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("gr\u00fcn".encode("latin-1"))
    for name in ("a.tar.gz", "file.bin"):
        Path(name).write_bytes(b"x")
    tinydata.prompts(Path("prompts.txt"))
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        data_of(how, **options)


def test_a_size_that_is_none_of_the_pipeline(pipe, tmp_path):
    data = data_of(tinydata.folder(tmp_path / "set"), size=18)
    with pytest.raises(ValueError, match="pictures of 18 x 18 pixels do not divide"):
        data.batches(pipe, 0)
    larger = data_of(tmp_path / "set", size=32).batches(pipe, 0)(0, 1)
    assert larger["latents"].shape == (1, 64, 16) and larger["img_ids"].shape == (64, 3)


def test_shapes_are_one_such_source(pipe):
    data = data_of("shapes")
    assert data.label is None and len(data.categories) == 6 and len(data.prompts(3)) == 3
    assert data.facts() == {}


def test_prompts_for_the_report_and_labels(tmp_path):
    path = tinydata.folder(tmp_path / "set")
    data = data_of(path)
    assert len(set(data.prompts(6)) & set(tinydata.CAPTIONS)) == 6
    assert data.categories == ()
    labels = {data_of(path, **o).label for o in ({}, {"size": 16}, {"window": 7})}
    (path / "003.png").unlink()
    assert len(labels | {data_of(path).label}) == 4  # another order of samples is another run
    assert dataclasses.is_dataclass(data)
