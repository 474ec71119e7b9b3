"""Drawing from a pipeline directory: defaults in one place, a picture depends on its seed alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from d2m.families.generation_defaults import generation_defaults, write_defaults
from d2m.generate import generate_with, load_pipeline, settings
from tests.tiny.pipeline import IMAGE_SIZE, MAX_SEQUENCE_LENGTH

PROMPTS = ["a red circle", "two blue squares", "a green cross above a ring"]


@pytest.fixture(scope="module")
def directory(tiny_dense_dir: Path) -> Path:
    return tiny_dense_dir


@pytest.fixture(scope="module")
def pipe(directory: Path):
    return load_pipeline(directory, device="cpu")


def skeleton(path: Path, **configs: dict) -> Path:
    """A pipeline directory of config files alone."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for name, config in configs.items():
        folder = path / name
        folder.mkdir(exist_ok=True)
        file = "tokenizer_config.json" if name.startswith("tokenizer") else "config.json"
        (folder / file).write_text(json.dumps(config))
    return path


def test_fallbacks_come_from_the_configs(directory: Path) -> None:
    assert generation_defaults(directory) == {
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    }


def test_fallbacks_of_flux_dev_and_schnell(tmp_path: Path) -> None:
    """The figures in the published configs: VAE sample_size 1024, T5 length 512."""
    for guided, steps, guidance in ((True, 28, 3.5), (False, 4, 0.0)):
        path = skeleton(
            tmp_path / str(guided),
            transformer={"guidance_embeds": guided},
            vae={"sample_size": 1024},
            tokenizer_2={"model_max_length": int(1e30)},
        )
        assert generation_defaults(path) == {
            "height": 1024,
            "width": 1024,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "max_sequence_length": 512 if guided else 256,
        }


def test_defaults_file_wins_and_overrides_win_over_it(tmp_path: Path) -> None:
    path = skeleton(tmp_path, vae={"sample_size": 32})
    write_defaults(path, height=64, num_inference_steps=16)
    values = generation_defaults(path)
    assert (values["height"], values["width"], values["num_inference_steps"]) == (64, 32, 16)
    values = settings(path, height=None, num_inference_steps=2, guidance_scale=0.0)
    assert (values["height"], values["num_inference_steps"]) == (64, 2)
    assert values["guidance_scale"] == 0.0


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"hight": 32}, "'hight'"),
        ({"height": 0}, "height is 0"),
        ({"height": 32.5}, "height is 32.5"),
        ({"height": True}, "height is True"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"guidance_scale": "3"}, "guidance_scale is '3'"),
    ],
)
def test_a_bad_defaults_file_is_refused(tmp_path: Path, values: dict, word: str) -> None:
    path = skeleton(tmp_path)
    with pytest.raises(ValueError, match=word):
        write_defaults(path, **values)
    assert not (path / "defaults.json").exists()
    (path / "defaults.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=word):
        generation_defaults(path)


def test_broken_json_and_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        generation_defaults(tmp_path)
    path = skeleton(tmp_path)
    (path / "defaults.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        generation_defaults(path)
    (path / "defaults.json").write_text("[]")
    with pytest.raises(ValueError, match=r"holds \[\], expected a JSON object"):
        generation_defaults(path)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        (path / "defaults.json").write_text("{}")
        settings(path, num_inference_steps=0)


def test_load_refuses_an_unknown_dtype(directory: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'fp8' is not known"):
        load_pipeline(directory, device="cpu", dtype="fp8")


def test_pictures_do_not_depend_on_the_batch(directory: Path, pipe) -> None:
    values = settings(directory, num_inference_steps=2)
    seeds = [5, 6, 7]
    together = generate_with(pipe, batch_size=3, **values)(PROMPTS, seeds)
    apart = generate_with(pipe, batch_size=2, **values)(PROMPTS, seeds)
    assert [picture.size for picture in together] == [(IMAGE_SIZE, IMAGE_SIZE)] * 3
    for one, other in zip(together, apart, strict=True):
        # sums are rounded differently in another batch: a grey level at most
        difference = np.asarray(one).astype(int) - np.asarray(other)
        assert abs(difference).max() <= 1


def test_a_picture_is_its_prompt_and_its_seed(directory: Path, pipe) -> None:
    draw = generate_with(pipe, batch_size=4, **settings(directory, num_inference_steps=2))
    a, b, c, d = (np.asarray(x) for x in draw([PROMPTS[0]] * 3 + [PROMPTS[1]], [1, 1, 2, 1]))
    assert (a == b).all()
    assert (a != c).any()
    assert (a != d).any()


def test_draw_is_what_the_pipeline_draws(directory: Path, pipe) -> None:
    import torch

    values = settings(directory, num_inference_steps=2)
    [ours] = generate_with(pipe, **values)(PROMPTS[:1], [9])
    plain = pipe(
        PROMPTS[0],
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=2,
        guidance_scale=3.5,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=torch.Generator().manual_seed(9),
    ).images[0]
    assert (np.asarray(ours) == np.asarray(plain)).all()


def test_bad_arguments_of_draw(directory: Path, pipe) -> None:
    with pytest.raises(ValueError, match="batch size is 0"):
        generate_with(pipe, batch_size=0)
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        generate_with(pipe, **settings(directory))(PROMPTS[:2], [1])
