"""Checkpoints survive kill -9 at any moment, and damage that comes afterwards is found."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from d2m.distill import checkpoint
from tests.cases.fresh_process import python

TENSORS = {"student/a": torch.arange(6.0).view(2, 3), "exp_avg/a": torch.randn(2, 3)}


def fill(folder, steps=(1, 2, 3)):
    for step in steps:
        tensors = {name: tensor + step for name, tensor in TENSORS.items()}
        checkpoint.save(folder, 1, step, tensors, {"done": 10 + step, "seconds": 0.1 * step})
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_keeps_the_last_two(tmp_path):
    folder = fill(tmp_path / "c")
    assert names(folder) == ["01-0000002", "01-0000003"]
    assert names(folder / "01-0000003") == ["state.json", "state.safetensors"]
    record, tensors = checkpoint.latest(folder)
    assert record == {"stage": 1, "step": 3, "facts": {"done": 13, "seconds": 0.1 * 3}}
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor + 3)


def test_order_is_by_stage_then_step(tmp_path):
    for stage, step in ((0, 90), (0, 100), (1, 0)):
        checkpoint.save(tmp_path, stage, step, TENSORS, {})
    assert checkpoint.latest(tmp_path)[0]["stage"] == 1
    assert names(tmp_path) == ["00-0000100", "01-0000000"]


def test_order_is_not_by_the_clock(tmp_path):
    """The newest one's times may be a year before the older one's, or in 1970."""
    for moment in (0, 4e9):
        fill(tmp_path)
        for path in (tmp_path / "01-0000003").iterdir():
            os.utime(path, (moment, moment))
        os.utime(tmp_path / "01-0000003", (moment, moment))
        assert checkpoint.latest(tmp_path)[0]["step"] == 3
        fill(tmp_path, (4,))
        assert names(tmp_path) == ["01-0000003", "01-0000004"]
        checkpoint.clear(tmp_path)


def test_none_and_clear(tmp_path):
    assert checkpoint.latest(tmp_path / "nothing") is None
    checkpoint.clear(tmp_path / "nothing")
    (tmp_path / "mine.txt").write_text("keep")
    fill(tmp_path)
    (tmp_path / ".01-0000009.abc.tmp").mkdir()
    checkpoint.clear(tmp_path)
    assert names(tmp_path) == ["mine.txt"] and checkpoint.latest(tmp_path) is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def move_on(path):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"step": 999}))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.safetensors", cut),
        ("state.safetensors", flip),
        ("state.safetensors", Path.unlink),
        ("state.json", cut),
        ("state.json", move_on),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_bytes(b"\xff\x00")),
        ("state.json", Path.unlink),
    ],
)
def test_damage_is_found_and_the_one_before_taken(tmp_path, file, damage):
    folder = fill(tmp_path)
    damage(folder / "01-0000003" / file)
    said = []
    record, tensors = checkpoint.latest(folder, said.append)
    assert record["step"] == 2 and torch.equal(tensors["student/a"], TENSORS["student/a"] + 2)
    [sentence] = said
    assert "01-0000003 is damaged" in sentence and "the previous one used" in sentence
    assert names(folder) == ["01-0000002"]  # or later ones would count it among the last two


def test_all_damaged(tmp_path):
    folder = fill(tmp_path)
    for name in names(folder):
        cut(folder / name / "state.safetensors")
    said = []
    assert checkpoint.latest(folder, said.append) is None and len(said) == 2


def test_a_failed_write_leaves_the_old_ones(tmp_path, monkeypatch):
    folder = fill(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, 1, 4, TENSORS, {})
    assert names(folder) == ["01-0000002", "01-0000003"]


# ---------------------------------------------------------------- kill -9

# One process imports torch and diffusers, then forks a trainer again and again and kills it: every
# trainer is a process of its own and starts within milliseconds.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from d2m.distill.loop import distill
from tests.tiny.pair import recipe_with, tiny_batches, tiny_pair
import d2m.model.sparse_transformer

workdir, kills, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tiny_pair()

def train(run, save_seconds):
    child = os.fork()
    if child:
        return child
    try:
        student, teacher = tiny_pair()
        distill(student, teacher, recipe_with(steps), tiny_batches, workdir=workdir / run,
                resume=True, save_seconds=save_seconds, log_every=3, log=lambda text: None)
        save_file(dict(student.state_dict()), workdir / (run + ".safetensors"))
        os._exit(0)
    except BaseException as error:
        print(type(error), error, flush=True)
        os._exit(1)

started = time.monotonic()
assert os.waitpid(train("whole", 1e9), 0)[1] == 0
took = time.monotonic() - started
moments = random.Random()
for number in range(kills):
    child = train("killed", 0)
    # A run that saves every step is slower, and only what is left of it runs.
    time.sleep(moments.uniform(0.1, 0.9) * took * 2 / kills)
    os.kill(child, signal.SIGKILL)
    code = os.waitpid(child, 0)[1]
    print("killed" if os.WIFSIGNALED(code) else "ended", code, flush=True)
assert os.waitpid(train("killed", 0), 0)[1] == 0
"""


def kill_and_compare(tmp_path, kills, steps):
    answer = python("-c", KILLER, tmp_path, kills, steps, env={"CUDA_VISIBLE_DEVICES": ""})
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"killed {signal.SIGKILL.value}" in answer.stdout
    whole, killed = (tmp_path / f"{run}.safetensors" for run in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (tmp_path / run / "log.jsonl").open()
        ]
        for run in ("whole", "killed")
    ]
    assert logs[0] == logs[1]
    folder = tmp_path / "killed" / "checkpoints"
    assert len(names(folder)) <= 2  # and no leftovers of the killed writes


def test_kill_9_and_resume_is_bit_equal(tmp_path):
    kill_and_compare(tmp_path, kills=5, steps=10)


@pytest.mark.slow
def test_kill_9_and_resume_is_bit_equal_many_times(tmp_path):
    kill_and_compare(tmp_path, kills=60, steps=60)
