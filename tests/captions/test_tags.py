"""WD14 taggers: how tags are written, and a tagger in ONNX that knows the mean colour of what it sees."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_lab.captions.captioner import certain_captions, check_captioner, load_captioner
from lora_lab.captions.refiner import load_refiner, run_refiner
from lora_lab.captions.tags import Tag, select, tag_text
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage

CPU = torch.device("cpu")
# Name, category, weights of blue, green and red (their means over the square, from 0 to 1), and bias, before a sigmoid.
ROWS = (
    ("general", 9, (0, 0, 0), 9),  # a rating
    ("blue_theme", 0, (8, 0, 0), -4), ("green_theme", 0, (0, 8, 0), -4), ("red_theme", 0, (0, 0, 8), -4),
    ("^_^", 0, (0, 0, 4), -3.5), ("miku_(cosplay)", 4, (4, 0, 0), -1), ("solo", 0, (0, 0, -1), -0.1),
)  # fmt: skip


def save_tagger(folder: Path, batch: int | str = "batch", size: int = 16, rows=ROWS) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True)
    weights = torch.tensor([weights for _, _, weights, _ in ROWS], dtype=torch.float32).T / 255
    biases = torch.tensor([bias for *_, bias in ROWS], dtype=torch.float32)
    constants = {"weights": weights.numpy(), "biases": biases.numpy(), "axes": torch.tensor([1, 2]).numpy()}
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["products"]),
        helper.make_node("Add", ["products", "biases"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["confidences"]),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, size, size, 3])
    confidences = helper.make_tensor_value_info("confidences", TensorProto.FLOAT, [batch, len(ROWS)])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tagger", [pixels], [confidences], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    with (folder / "selected_tags.csv").open("w", newline="") as file:
        table = [(number, name, category, 1) for number, (name, category, *_) in enumerate(rows)]
        csv.writer(file).writerows([("tag_id", "name", "category", "count"), *table])
    return folder


def settings(folder: Path, *overrides: str):
    return compose("captioner=tags", f"captioner.base={folder}", *overrides).captioner


@pytest.mark.parametrize(
    ("tag", "spaces", "escaped", "text"),
    [
        ("long_hair", True, False, "long hair"),
        ("long_hair", False, False, "long_hair"),
        ("^_^", True, False, "^_^"),
        ("o_o", True, True, "o_o"),
        ("(o)_(o)", True, True, r"\(o\)_\(o\)"),
        ("miku_(cosplay)", True, False, "miku (cosplay)"),
        ("miku_(cosplay)", False, True, r"miku_\(cosplay\)"),
        ("1girl", True, True, "1girl"),
    ],
)
def test_a_tag_is_written_as_a_caption_has_it(tag, spaces, escaped, text):
    assert tag_text(tag, spaces, escaped) == text


def test_tags_that_reach_their_threshold_are_ordered_by_confidence():
    tags = [Tag(1, "smile", 0.35), Tag(2, "miku", 0.85), Tag(3, "hat", 0.35), Tag(4, "solo", 0.35)]
    assert select(tags, [0.99, 0.35, 0.8, 0.34, 0.9]) == [("solo", 0.9), ("smile", 0.35)]


def test_tags_keep_their_words_and_get_the_trigger_in_front():
    captions = ["1girl, cat, long hair, ^_^, ._.", "no humans, robot, solo, robot", "hana_tofu, 1boy"]
    refined = run_refiner(load_refiner(compose("refiner=tags").refiner), captions, "HANA_TOFU", ["", "waving", ""])
    assert refined == [
        "HANA_TOFU, 1girl, cat, long hair, ^_^, ._.", "HANA_TOFU, no humans, robot, solo, waving", "HANA_TOFU, 1boy",
    ]  # fmt: skip
    assert run_refiner(load_refiner(compose("refiner=tags").refiner), refined, "HANA_TOFU") == refined


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("captioner.base=tests", r"captioner\.base=tests: there is no model\.onnx"),
        ("captioner.exclude=5", r"captioner\.exclude=5: "),
    ],
)
def test_a_wrong_setting_is_named_without_loading_the_tagger(override, sentence):
    with pytest.raises(InputError, match=sentence):
        check_captioner(compose("captioner=tags", override).captioner)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    return save_tagger(tmp_path_factory.mktemp("tagger") / "tagger")


@pytest.fixture
def images():
    """Red, half of it white once it is a square; a blue one; and a black one, which has no colour."""
    return [Image.new("RGB", size, colour) for size, colour in (((40, 20), "red"), ((8, 8), "blue"), ((9, 9), "black"))]


@pytest.mark.slow
def test_the_right_tags_are_written(tagger, images, capsys):
    assert load_captioner(settings(tagger), CPU).caption(images) == [
        "red theme, ^_^, blue theme, green theme",  # white is blue and green too
        "blue theme, miku (cosplay), solo",
        "solo",
    ]
    chosen = (
        "captioner.exclude=[solo, blue theme,unknown]",
        "captioner.spaces=false",
        "captioner.escape_brackets=true",
    )
    stricter = ("captioner.general_threshold=0.7", "captioner.character_threshold=0.96")
    captioner = load_captioner(settings(tagger, *chosen), CPU)
    assert captioner.caption(images) == ["red_theme, ^_^, green_theme", r"miku_\(cosplay\)", ""]
    assert "captioner.exclude: the tagger has no tag unknown" in capsys.readouterr().out.splitlines()
    assert load_captioner(settings(tagger, *stricter), CPU).caption(images) == ["red theme", "blue theme", ""]


@pytest.mark.slow
def test_tags_do_not_depend_on_their_batch_and_have_their_confidence(tagger, images, tmp_path):
    whole = load_captioner(settings(tagger), CPU).phrases(images)
    single = load_captioner(settings(save_tagger(tmp_path / "single", batch=1), "captioner.batch_size=3"), CPU)
    for many, one in zip(whole, single.phrases(images), strict=True):
        assert [tag for tag, _ in many] == [tag for tag, _ in one]
        assert [value for _, value in many] == pytest.approx([value for _, value in one], abs=1e-5)
    assert dict(whole[1])["blue theme"] == pytest.approx(1 / (1 + 2.718281828**-4), abs=1e-4)
    assert certain_captions(single, images, 0.9)[1:] == [
        ("blue theme, miku (cosplay)", ("solo",)), ("solo", ()),
    ]  # fmt: skip
    assert certain_captions(load_captioner(settings(tagger, "captioner.exclude=[solo]"), CPU), images, 0.9)[2] == (
        "",
        (),
    )


@pytest.mark.slow
def test_the_tagger_reports_to_nobody(tagger, tmp_path):
    """onnxruntime keeps the session of its reports in the folder of temporary files."""
    program = (
        "import sys, torch; from lora_lab.captions.tags import load_tagger; "
        "load_tagger(sys.argv[1], torch.device('cpu'))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program, str(tagger)], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_is_no_tagger_is_refused(tmp_path):
    few = save_tagger(tmp_path / "few", rows=ROWS[:-1])
    with pytest.raises(InputError, match=r"selected_tags\.csv has 6 tags, .*model\.onnx 7"):
        load_captioner(settings(few), CPU)
    (few / "selected_tags.csv").write_text("a,b\n")
    with pytest.raises(InputError, match=r"selected_tags\.csv: no columns name and category"):
        load_captioner(settings(few), CPU)
    (save_tagger(tmp_path / "cut") / "model.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(InputError, match=r"the captioner .*cut cannot be loaded \("):
        load_captioner(settings(tmp_path / "cut"), CPU)
    with pytest.raises(InputError, match=r"four/model\.onnx reads \[4, 16, 16, 3\]"):
        load_captioner(settings(save_tagger(tmp_path / "four", batch=4)), CPU)


@pytest.mark.slow
def test_a_picture_without_a_tag_stays_without_a_caption_and_is_named(tagger, tmp_path, images, capsys):
    root = tmp_path / "data"
    root.mkdir()
    for number, image in enumerate(images):
        image.save(root / f"{number}.png")
    overrides = (
        "stage=caption",
        "dataset=folder",
        f"dataset.root={root}",
        "captioner=tags",
        f"captioner.base={tagger}",
    )
    result = run_stage(compose(*overrides, "captioner.exclude=[solo]", "device=cpu"), tmp_path / "run")
    assert {*result.captions} == {"0.png", "1.png"} and result.kept == 1
    assert "2.png: no new caption; the same command tries again" in capsys.readouterr().out
