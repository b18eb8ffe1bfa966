"""Caption files: what is read, what is refused, and that nothing is lost."""

import json
import unicodedata

import pytest

from lora_lab.captions.files import natural_key, read_caption_file, read_caption_lists, read_captions, write_captions
from lora_lab.errors import InputError

HARD = {
    "1.png": 'A HANA_TOFU says "hello, there"',
    "2.png": "=SUM(A1), +1, -1, @home",
    "10.png": "눈을 감은 HANA_TOFU, 웃는 얼굴 🙂",
    "두부/image_3.png": "it's; a|b\\n C:\\x\ttab",
}


def lay_out(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not looked into")


def everything(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_names_are_sorted_in_natural_order():
    names = ["image_10.png", "image_2.png", "Image_1.png", "a/10.png", "a/9.png", "1.png", "01.png", ".png"]
    ordered = sorted(names, key=natural_key)
    assert ordered == ["01.png", "1.png", ".png", "a/9.png", "a/10.png", "Image_1.png", "image_2.png", "image_10.png"]


def test_captions_survive_every_form(tmp_path):
    lay_out(tmp_path, HARD)
    for form in ("csv", "jsonl", "json", "txt", "jsonl", "caption", "csv"):
        write_captions(tmp_path, HARD, form)
        for path in tmp_path.glob("metadata.*"):
            if path.suffix != f".{form}":
                path.unlink()
        for path in [*tmp_path.rglob("*.txt"), *tmp_path.rglob("*.caption")]:
            if path.suffix != f".{form}":
                path.unlink()
        read = read_captions(tmp_path)
        assert read == {name: " ".join(text.splitlines()) for name, text in HARD.items()}
        assert list(read) == ["1.png", "2.png", "10.png", "두부/image_3.png"]


def test_a_folder_without_captions_has_none(tmp_path):
    lay_out(tmp_path, ["1.png", "sub/2.png"])
    (tmp_path / "README.txt").write_text("beside no picture")
    assert read_captions(tmp_path) == {}
    assert read_captions(tmp_path / "missing") == {}


@pytest.mark.parametrize(
    "row",
    [
        '{"file_name": "1.png", "text": "a cat"}',
        '{"image": "1.png", "text": "a cat"}',
        '{"file": "./1.png", "caption": " a\\n cat "}',
        '\ufeff{"file_name": "./1.png", "prompt": "a\\u2028cat"}\r\n\r\n',
    ],
)
def test_jsonl_is_read_with_old_field_names(tmp_path, row):
    (tmp_path / "metadata.jsonl").write_bytes(row.encode())
    assert read_captions(tmp_path) == {"1.png": "a cat"}


def test_csv_of_korean_excel_is_read(tmp_path):
    (tmp_path / "metadata.csv").write_bytes('file_name,text\r\n두부.png,"웃는, 두부"\r\n,\r\n'.encode("cp949"))
    assert read_captions(tmp_path) == {"두부.png": "웃는, 두부"}


def test_csv_opens_in_korean_excel(tmp_path):
    (path,) = write_captions(tmp_path, {"1.png": "두부"}, "csv")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")


def test_names_are_normalised(tmp_path):
    name = unicodedata.normalize("NFD", "각도.png")
    (tmp_path / "metadata.json").write_text(json.dumps({f".\\sub\\{name}": "x", "2.png": "", "3.png": None}))
    assert read_captions(tmp_path) == {"sub/" + unicodedata.normalize("NFC", name): "x"}


def test_a_txt_file_is_found_for_an_image_with_a_decomposed_name(tmp_path):
    picture = tmp_path / unicodedata.normalize("NFD", "각.png")
    picture.write_bytes(b"")
    (path,) = write_captions(tmp_path, {"각.png": "x"}, "txt")
    assert path.name == unicodedata.normalize("NFD", "각.txt")
    assert read_captions(tmp_path) == {"각.png": "x"}


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("metadata.jsonl", '{"file_name": "1.png", "text": "a"}\n{"file_name": "2.png", "te', "line 2: not JSON"),
        ("metadata.jsonl", '{"file_name": "1.png"}', "line 1: no field 'text'"),
        ("metadata.jsonl", '["1.png", "a"]', "line 1: not a row"),
        ("metadata.jsonl", '{"file_name": "1.png", "text": 3}', "line 1: the caption is 3"),
        ("metadata.jsonl", '{"file_name": "", "text": "a"}', "line 1: the file name is ''"),
        ("metadata.jsonl", '{"file_name": "../1.png", "text": "a"}', "not inside the dataset folder"),
        ("metadata.jsonl", '{"file_name": "C:\\\\x\\\\1.png", "text": "a"}', "not inside the dataset folder"),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "a \\ud83d"}', "broken character"),
        (
            "metadata.jsonl",
            '{"file": "1.png", "text": "a"}\n{"file": "./1.png", "text": "b"}',
            "line 2: 1.png occurs twice",
        ),
        ("metadata.csv", "1.png,a cat\n", "line 1: no field 'file_name' among '1.png', 'a cat'"),
        ("metadata.csv", "file_name,text\n1.png,a cat, smiling\n", "line 2: 3 cells where the header has 2"),
        ("metadata.csv", 'file_name,text\n1.png,"a cat\n2.png,b\n', "line 3: .*check the double quotes"),
        ("metadata.csv", b"file_name,text\n1.png,\xff\xff\n", "is not UTF-8"),
        ("metadata.json", '{\n"1.png": "a",\n}', "line [23]: not JSON"),  # Python 3.13 names the line of the comma
        ("metadata.json", '{"1.png": "a", "1.png": "b"}', "1.png occurs twice"),
        ("metadata.json", '["1.png"]', "not a mapping"),
    ],
)
def test_an_error_names_file_and_line(tmp_path, file, content, sentence):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=sentence) as error:
        read_captions(tmp_path)
    assert file in str(error.value)


def test_a_row_may_be_repeated(tmp_path):
    row = '{"file_name": "1.png", "text": "a"}\n'
    (tmp_path / "metadata.jsonl").write_text(row + row)
    assert read_captions(tmp_path) == {"1.png": "a"}


def test_two_forms_may_agree_but_not_differ(tmp_path):
    (tmp_path / "metadata.json").write_text('{"1.png": "a", "2.png": "b"}')
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,a\n2.png,b\n")
    assert read_captions(tmp_path) == {"1.png": "a", "2.png": "b"}
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,a\n2.png,c\n")
    with pytest.raises(InputError, match=r"metadata.csv and metadata.json .* differ \(first at 2.png\).*stage=convert"):
        read_captions(tmp_path)


def test_a_named_file_is_read_and_others_are_refused(tmp_path):
    lay_out(tmp_path, ["1.png"])
    with pytest.raises(InputError, match=r"no \.txt file with a caption beside a picture"):
        read_caption_file(tmp_path)
    (tmp_path / "1.txt").write_bytes("\ufeffa cat\r\nsmiling\r\n".encode())
    assert read_caption_file(tmp_path) == {"1.png": "a cat smiling"}
    (tmp_path / "hints.csv").write_text("file_name,text\n1.png,in the snow\n")
    assert read_caption_file(tmp_path / "hints.csv") == {"1.png": "in the snow"}
    with pytest.raises(InputError, match=r"is not a caption file: name a .jsonl, .csv or .json file"):
        read_caption_file(tmp_path / "1.txt")
    with pytest.raises(InputError, match=r"no caption file .*: check the path"):
        read_caption_file(tmp_path / "none.csv")


def test_every_change_keeps_a_backup(tmp_path):
    for text in ("one", "two", "two", "three"):
        write_captions(tmp_path, {"1.png": text}, "jsonl")
    kept = [json.loads((tmp_path / f"metadata.{n}.jsonl.bak").read_text())["text"] for n in (1, 2)]
    assert kept == ["one", "two"]
    assert len(list(tmp_path.iterdir())) == 3, "no backup of what did not change, no temporary file"


@pytest.mark.parametrize("form", ["jsonl", "csv", "json", "txt", "caption"])
def test_captions_are_written_in_the_form_that_the_folder_has(tmp_path, form):
    lay_out(tmp_path, ["1.png", "2.png"])
    written = write_captions(tmp_path, {"1.png": "a", "2.png": "b"}, form)
    assert write_captions(tmp_path, {"1.png": "c", "2.png": "b"}) == written
    assert read_captions(tmp_path) == {"1.png": "c", "2.png": "b"}


def test_another_form_with_other_captions_becomes_a_backup(tmp_path):
    lay_out(tmp_path, ["1.png", "2.png"])
    old = {"1.png": "a", "2.png": "b"}
    write_captions(tmp_path, old, "txt")
    write_captions(tmp_path, old, "csv")
    assert read_captions(tmp_path) == old
    before = everything(tmp_path)
    write_captions(tmp_path, {"1.png": "new", "2.png": "b"}, "jsonl")
    assert read_captions(tmp_path) == {"1.png": "new", "2.png": "b"}
    assert set(before.values()) <= set(everything(tmp_path).values()), "nothing is lost"


def test_the_txt_file_of_a_removed_caption_becomes_a_backup(tmp_path):
    lay_out(tmp_path, ["1.png", "2.png"])
    write_captions(tmp_path, {"1.png": "a", "2.png": "b"}, "txt")
    write_captions(tmp_path, {"1.png": "a"}, "txt")
    assert read_captions(tmp_path) == {"1.png": "a"}
    assert (tmp_path / "2.1.txt.bak").read_text() == "b\n"


def test_other_fields_of_jsonl_are_kept(tmp_path):
    rows = [
        {"file_name": "10.png", "text": "a", "license": "CC0", "tags": ["x"]},
        {"image": "./2.png", "caption": "b", "width": 64},
        {"file_name": "3.png", "text": "", "width": 32},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_captions(tmp_path, {"2.png": "c", "10.png": "a"})
    assert [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()] == [
        {"file_name": "2.png", "text": "c", "width": 64},
        {"file_name": "3.png", "text": "", "width": 32},
        {"file_name": "10.png", "text": "a", "license": "CC0", "tags": ["x"]},
    ]


def test_pictures_that_would_share_one_txt_are_refused_before_anything_is_written(tmp_path):
    lay_out(tmp_path, ["1.png", "1.jpg"])
    before = everything(tmp_path)
    with pytest.raises(InputError, match=r"would share 1.txt"):
        write_captions(tmp_path, {"1.png": "a", "1.jpg": "b"}, "txt")
    with pytest.raises(InputError, match=r"unknown form of captions 'xml'"):
        write_captions(tmp_path, {"1.png": "a"}, "xml")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_several_captions_are_read_and_never_lost(tmp_path, form):
    content = {
        "jsonl": '{"file_name": "1.png", "text": ["a cat", "a dog"]}\n{"file_name": "2.png", "text": "a cow"}\n',
        "json": '{"1.png": ["a cat", "a dog"], "2.png": "a cow"}',
    }[form]
    file = tmp_path / f"metadata.{form}"
    file.write_text(content)
    assert read_caption_lists(tmp_path) == {"1.png": ("a cat", "a dog"), "2.png": ("a cow",)}
    for read in (read_captions, lambda _: read_caption_file(file)):
        with pytest.raises(
            InputError, match=r"1\.png in .* has 2 captions, which only stage=train and stage=check accept"
        ):
            read(tmp_path)
    write_captions(tmp_path, {"1.png": "a pig"}, form)
    assert (tmp_path / f"metadata.1.{form}.bak").read_text() == content


def test_a_list_of_anything_but_texts_is_refused(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": ["a cat", 3]}')
    with pytest.raises(InputError, match=r"line 1: the caption is 3"):
        read_caption_lists(tmp_path)


ROWS = {"00.png": "a cat", "sub/01.png": "two cats, one hat"}
KOHYA = {f"/home/me/train/{name}": {"caption": text, "train_resolution": [64, 64]} for name, text in ROWS.items()}
SHORT = {name.removesuffix(".png"): {"caption": text.split(", ")[0], "tags": ", ".join(text.split(", ")[1:])}
         for name, text in ROWS.items()}  # fmt: skip
JSONL = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in ROWS.items())


def table(delimiter, header=("file_name", "text")):
    rows = [header, *((name, f'"{text}"') for name, text in ROWS.items())]
    return "".join(delimiter.join(row) + "\r\n" for row in rows)


@pytest.mark.parametrize(
    "files",
    [
        {"00.caption": "a cat\n", "sub/01.caption": "two cats, one hat"},
        {"00.TXT": "a cat\r\n", "sub/01.Txt": "two cats,\none hat"},
        {"00.CAPTION": "a cat", "sub/01.caption": "two cats, one hat"},
        {"METADATA.JSONL": JSONL},
        {"metadata1000.jsonl": JSONL},
        {
            "metadata_train.jsonl": "".join(
                json.dumps({"image": n, "caption": t, "x": 1}) + "\n" for n, t in ROWS.items()
            )
        },
        {"sub/metadata.jsonl": JSONL},
        {"metadata.csv": table(";")},
        {"metadata.csv": table("\t", ("Image", "Caption"))},
        {"metadata.csv": "sep=;\r\n" + table(";", ("filename", "prompt"))},
        {"metadata.csv": table(",", ("path", "text"))},
        {"metadata.json": json.dumps([{"file_name": name, "text": text} for name, text in ROWS.items()])},
        {"metadata.json": json.dumps({name: {"caption": text} for name, text in ROWS.items()})},
        {"metadata.json": json.dumps(KOHYA)},
        {"metadata.json": json.dumps(SHORT)},
        {"meta_cap.json": json.dumps(KOHYA)},
        {"meta_lat.json": json.dumps({name: {"tags": text} for name, text in ROWS.items()})},
        {"metadata.jsonl": JSONL.replace("sub/", "C:\\\\pictures\\\\sub\\\\")},
    ],
    ids=lambda files: "-".join(files),
)
def test_captions_of_every_known_form_are_read_and_then_written_without_a_loss(tmp_path, files):
    lay_out(tmp_path, ["00.png", "sub/01.png", *files])
    for name, content in files.items():
        (tmp_path / name).write_text(content, newline="")
    assert read_captions(tmp_path) == ROWS
    before = everything(tmp_path)
    write_captions(tmp_path, ROWS | {"00.png": "a dog"})
    assert read_captions(tmp_path) == ROWS | {"00.png": "a dog"}
    kept = {content.strip() for content in everything(tmp_path).values()}
    assert {content.strip() for content in before.values()} <= kept, "nothing is lost"


@pytest.mark.parametrize(
    "files",
    [
        {"captions.csv": table(",")},
        {"sub/captions.jsonl": JSONL},
        {"train.tsv": table("\t")},
        {"prompts.json": json.dumps(ROWS)},
        {"00.json": json.dumps({"caption": "a cat", "score": 3})},
        {"sub/01.png.json": json.dumps({"tags": "cat, hat"})},
        {"00.png.txt": "a cat"},
        {"a/b/metadata.jsonl": '{"file_name": "02.png", "text": "a cat"}'},
        {"metadata.jsonl": JSONL.split("\n")[0], "metadata1000.jsonl": JSONL},
    ],
    ids=lambda files: "-".join(files),
)
def test_captions_that_are_not_read_are_named_before_anything_is_captioned(tmp_path, files):
    lay_out(tmp_path, ["00.png", "sub/01.png", "a/b/02.png", *files])
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    sentence = rf"{list(files)[-1]} has a caption for .*, but is not read .*: make it .*metadata"
    with pytest.raises(InputError, match=sentence):
        read_caption_lists(tmp_path)
    captions = ROWS | {"a/b/02.png": "a hat"}
    for name, text in captions.items():  # whoever has other captions for all images is not disturbed
        (tmp_path / name).with_suffix(".txt").write_text(text)
    (tmp_path / "metadata.jsonl").unlink(missing_ok=True)
    assert read_captions(tmp_path) == captions


def test_other_json_files_of_a_folder_are_no_captions(tmp_path):
    lay_out(tmp_path, ["00.png"])
    for name, text in {"result.json": "{}", "a.json": "[1, 2]", "b.csv": "x,y\n1,2\n", "c.json": "no"}.items():
        (tmp_path / name).write_text(text)
    for name in ("metadata.proposed.jsonl", "hints.jsonl", "captions.history.jsonl"):
        (tmp_path / name).write_text('{"file_name": "00.png", "text": "a cat"}\n')
    assert read_captions(tmp_path) == {}


def test_names_are_relative_to_the_folder_of_their_file_or_to_the_datasets(tmp_path):
    lay_out(tmp_path, ["a/1.png", "b/1.png", "b/2.png"])
    (tmp_path / "a/metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}')
    (tmp_path / "b/metadata.csv").write_text("file_name,text\nb/1.png,two\n2.png,three\n")
    assert read_captions(tmp_path) == {"a/1.png": "one", "b/1.png": "two", "b/2.png": "three"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("1", "'1' may be 1.jpg or 1.png: write the whole name"), ("/x/2.png", "may be a/2.png or b/2.png"),
     ("/x/a/2.png", None), ("D:\\a\\2", None), ("a/2", None)],
)  # fmt: skip
def test_a_name_that_fits_several_pictures_is_refused(tmp_path, name, sentence):
    lay_out(tmp_path, ["1.png", "1.jpg", "a/2.png", "b/2.png"])
    (tmp_path / "metadata.json").write_text(json.dumps({name: "a cat"}))
    if sentence is None:
        assert read_captions(tmp_path) == {"a/2.png": "a cat"}
    else:
        with pytest.raises(InputError, match=sentence):
            read_captions(tmp_path)


def test_what_no_caption_file_can_have_is_refused_and_cut(tmp_path):
    for value, sentence in (
        ("a\0b", "NUL letters"),
        (["x" * 10**6, 3], "the caption is 3"),
        ({"a": "b" * 10**6}, "no field"),
    ):
        (tmp_path / "metadata.json").write_text(json.dumps({"1.png": value}))
        with pytest.raises(InputError, match=sentence) as error:
            read_caption_lists(tmp_path)
        assert len(str(error.value)) < 400 + len(str(tmp_path))
    (tmp_path / "metadata.json").write_text("[" * 10**6)
    with pytest.raises(InputError, match=r"metadata\.json: "):
        read_caption_lists(tmp_path)
    with pytest.raises(InputError, match="is not UTF-8: rename the picture"):
        write_captions(tmp_path, {"\udcff.png": "a cat"})


@pytest.mark.parametrize("form", ["jsonl", "csv", "json", "txt"])
@pytest.mark.slow
def test_a_caption_of_a_megabyte_is_read_and_written_like_any_other(tmp_path, form):
    lay_out(tmp_path, ["1.png"])
    for text in ("a cat, " * 150_000 + "end", "cat" * 300_000, "\x1b[31mred\x07 " * 80_000 + "end"):
        write_captions(tmp_path, {"1.png": text}, form)
        assert read_captions(tmp_path) == {"1.png": text}
