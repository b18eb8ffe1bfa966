"""Text files in the encodings that people's programs write: recognised by evidence, told once, refused in doubt."""

from pathlib import Path

import pytest

from lora_lab.captions.forms import decode_files
from lora_lab.errors import InputError

ENGLISH = "A HANA_TOFU with a purple background, smiling"
JAPANESE = ["青い髪, 笑顔", "HANA_TOFUが赤い帽子をかぶって笑っている", "図書館で本を読む、白い背景"]
KOREAN = ["파란 머리, 웃는 얼굴", "빨간 모자를 쓴 HANA_TOFU가 공원에서 웃고 있다", "흰 배경, 눈을 감은"]
SIMPLIFIED = ["蓝色头发, 微笑", "一个戴着红色帽子的HANA_TOFU在公园里", "白色背景, 闭着眼睛"]
TRADITIONAL = ["藍色頭髮, 微笑", "一個戴著紅色帽子的HANA_TOFU在公園裡", "白色背景, 閉著眼睛"]
GERMAN = ["Ärmel, Übermut", "schwarze Haare, grüne Augen, lächelt", "HANA_TOFU vor weißem Hintergrund"]
FRENCH = ["cheveux châtains, chapeau à plumes", "une crème brûlée, garçon", "HANA_TOFU fête Noël"]
POLISH = ["niebieskie włosy, uśmiech", "żółta łąka, zamknięte oczy"]
RUSSIAN = ["девочка с синими волосами, улыбка", "красная шляпа, белый фон"]
QUOTES = ["it’s a girl, she’s smiling", "a “nice” hat – red"]


@pytest.mark.parametrize(
    ("encoding", "sentences"),
    [
        *((encoding, [*JAPANESE, *KOREAN, *FRENCH]) for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")),
        *((encoding, sentences) for encoding in ("utf-16-be", "utf-16-le") for sentences in (JAPANESE, [ENGLISH])),
        ("cp932", JAPANESE), ("euc_jp", JAPANESE), ("cp949", KOREAN), ("gbk", SIMPLIFIED), ("big5", TRADITIONAL),
        ("cp1252", GERMAN), ("latin-1", GERMAN), ("cp1252", FRENCH), ("latin-1", FRENCH), ("cp1252", QUOTES),
        ("cp1250", POLISH), ("cp1251", RUSSIAN),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_every_encoding_is_read_as_what_it_is_and_told(encoding, sentences, tmp_path, capsys):
    texts = [f"{ENGLISH}, {sentence}\n" for sentence in sentences]
    for number, together in enumerate((texts, ["".join(texts)], [f"{ENGLISH}, {sentences[0]}\n"] * 6)):
        source = tmp_path / str(number)
        assert decode_files([text.encode(encoding) for text in together], source) == together
        assert decode_files([text.encode(encoding) for text in together], source) == together
        told = [line for line in capsys.readouterr().out.splitlines() if str(source) in line and " read as " in line]
        assert len(told) == (not encoding.startswith("utf-8")), "once for the files of a folder"


def test_each_file_may_be_unicode_while_others_are_not():
    contents = [JAPANESE[0].encode(), "\n".join(JAPANESE).encode("cp932"), JAPANESE[1].encode("utf-16"), b"plain"]
    assert decode_files(contents, Path("data")) == [JAPANESE[0], "\n".join(JAPANESE), JAPANESE[1], "plain"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("HANA_TOFU, 웃는".encode("cp949"), "save it again with the encoding UTF-8"),  # too little
        ("kék ég, mosolygó nő".encode("cp1250"), "may be cp1252 .*õ.* or cp1250 .*ő"),
        (b"a cat, \xff\xff", "save it again"),
        (b"a cat\0", "NUL letters"),
        (b"\0\0\0\0", "NUL letters"),
        (b"\xff\xfea", "NUL letters"),
        (KOREAN[1].encode("cp949") + JAPANESE[1].encode("cp932"), "save it again"),
    ],
)
def test_what_is_in_doubt_is_refused_in_one_sentence(content, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        decode_files([content], Path("data/1.txt"))
    assert str(error.value).startswith("data/1.txt ") and "\n" not in str(error.value)
