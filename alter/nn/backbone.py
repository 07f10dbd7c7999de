"""How a backbone is found, checked, loaded and told from others."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from alter.errors import AlterError, did_you_mean, in_short
from alter.nn.embedded import EMBEDDED, fetch
from alter.nn.hub import cached_snapshot, check_folder, download_snapshot, read_json, weight_files

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTISED = ("int8", "nf4")
PRECISIONS = ("fp32", "bf16", *QUANTISED)
MAX_PARAMETERS = 1_000_000_000
SAMPLES, SAMPLE_BYTES = 4, 256
SPECIAL_TOKENS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
# What a configuration says beside the function that the weights compute.
_NOT_IDENTITY = {
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "dtype",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def resolve_backbone(name: str) -> Path:
    """Finds the folder of a backbone, fetching it where needed.

    Args:
        name: a folder, the name of a bundled backbone, or a hub id.

    Returns:
        a folder with configuration and safetensors.

    Raises:
        AlterError: there is none, or it lacks a file.
    """
    name = str(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return folder
    if name in EMBEDDED:
        return fetch(name)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise AlterError(
            f"backbone: there is no folder {name}; name one with config.json and model.safetensors by --backbone."
        )
    return _from_hub(name)


def whole_name(name: str | Path) -> str:
    """The name of a backbone for a file that is read from other folders too: a local folder's is made absolute."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(name)


def _from_hub(name: str) -> Path:
    if cached := cached_snapshot(name):
        return cached
    try:
        return download_snapshot(name)
    except AlterError as error:
        reason = "; ".join(message.rstrip(".") for message in error.messages)
        raise AlterError(
            f"backbone: '{name}' is no folder and no bundled backbone ({', '.join(EMBEDDED)}), and as a hub id it "
            f"could not be fetched: {reason}; pass a folder or a bundled name by --backbone.{did_you_mean(name, EMBEDDED)}"
        ) from error


def is_seq2seq(path: str | Path) -> bool:
    """True for an encoder-decoder, by its configuration alone."""
    return bool(read_json(Path(path) / "config.json").get("is_encoder_decoder", False))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a backbone.

    Where it has no padding token, the end of sequence stands for it; padding is masked by the attention mask.

    Raises:
        AlterError: there is none in the folder, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        raise AlterError(
            f"{path}: its tokenizer cannot be loaded ({in_short(error)}); copy the whole folder."
        ) from error
    if tokenizer.eos_token is None:
        raise AlterError(f"{path}: its tokenizer names no eos_token, which ends every target; set it and save again.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.clean_up_tokenization_spaces = False  # an answer keeps the spaces that its target had
    return tokenizer


def check_trainable(precision: str, backbone_lr: float) -> None:
    """Says whether a backbone of some precision can train.

    Raises:
        AlterError: it is to train, at a rate above 0, and is neither in fp32 nor left to be (``auto``).
    """
    if backbone_lr > 0 and precision in PRECISIONS and precision != "fp32":
        raise AlterError(
            f"precision: the backbone trains (backbone_lr {backbone_lr:g}) and needs fp32, not {precision}; write "
            "precision: fp32, with trainer.precision: bf16-mixed for speed, or backbone_lr: 0."
        )


def load_backbone(name_or_path: str | Path, precision: str = "fp32") -> PreTrainedModel:
    """Loads a frozen causal or seq2seq language model in evaluation mode.

    Args:
        name_or_path: as ``resolve_backbone`` takes it.
        precision: fp32, bf16, int8 or nf4; with the last two, the head and what is tied to it stay unquantised, and the model
            stays on the device that is torch's default now.

    Raises:
        AlterError: the precision is unknown, or this is not a language model under 1B parameters.
    """
    if precision not in PRECISIONS:
        raise AlterError(
            f"precision: '{precision}' is none of {', '.join(PRECISIONS)}.{did_you_mean(str(precision), PRECISIONS)}"
        )
    path = resolve_backbone(str(name_or_path))
    _check_size(path)
    model_class = _model_class(path)
    try:
        with _without_bars():
            model, info = model_class.from_pretrained(
                path,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
                **_precision_options(precision),
            )
    except Exception as error:  # transformers raises many kinds here
        raise AlterError(f"{path}: it cannot be loaded as a language model ({in_short(error)}).") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise AlterError(
            f"{path}: its weights lack {missing[0]} ({len(missing)} in all), so it is not a whole language model; take "
            "one saved with its language model head."
        )
    _keep_gradients(model)
    _decode_plainly(model)
    return model.eval().requires_grad_(False)


def _decode_plainly(model: PreTrainedModel) -> None:
    """Leaves out how a backbone was meant to chat, such as a penalty on repetition or a forced first token.

    Targets are learned without it, and answers that copy from their prompt would suffer.
    """
    from transformers import GenerationConfig

    settings = model.generation_config.to_dict()
    model.generation_config = GenerationConfig(**{name: settings.get(name) for name in SPECIAL_TOKENS})


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within it transformers draws no progress bars, which would stay on the screen."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _keep_gradients(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from a CPU kernel without a backward pass.

    On processors with AVX512-BF16 it repacks a 4-bit map at the first inference in evaluation mode. From then on the
    map passes no gradient back, silently, so that adapters below it would not train.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # torch's types know no flags


def _model_class(path: Path) -> Any:
    """The class that loads this folder.

    Raises:
        AlterError: no class of transformers does, or it is an encoder alone.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    remedy = "take a causal or seq2seq language model."
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise AlterError(
            f"{path / 'config.json'}: transformers does not know this model ({in_short(error)})."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise AlterError(f"{path}: its weights are quantised already; take the plain ones and set precision instead.")
    seq2seq = getattr(config, "is_encoder_decoder", False)
    # transformers builds a causal model of BERT too; its weights are not trained for it.
    if not seq2seq and type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise AlterError(f"{path}: {config.model_type} is an encoder, which cannot write text; {remedy}")
    if type(config) not in (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if seq2seq else MODEL_FOR_CAUSAL_LM_MAPPING):
        raise AlterError(f"{path}: {config.model_type} has no language model head in transformers; {remedy}")
    return AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM


def _precision_options(precision: str) -> dict[str, Any]:
    import torch

    if precision == "fp32":
        return {"dtype": torch.float32}
    if precision == "bf16":
        return {"dtype": torch.bfloat16}
    from transformers import BitsAndBytesConfig

    # Quantised maps cannot move later, and transformers would put them on a GPU wherever there is one.
    device = torch.get_default_device()
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if fast else torch.float32
    if precision == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"dtype": dtype, "device_map": {"": device}, "quantization_config": config}


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """The offset of the data in a safetensors file, and its entries by tensor name."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        start, end = 8 + length, max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if start + end != file.stat().st_size:
            raise ValueError("its size is not what its header says")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise AlterError(f"{file}: not a whole safetensors file ({error}); fetch or copy it again.") from error
    return start, entries


def _check_size(path: Path) -> None:
    shapes = [entry["shape"] for file in weight_files(path) for entry in _read_header(file)[1].values()]
    if (count := sum(math.prod(shape) for shape in shapes)) > MAX_PARAMETERS:
        raise AlterError(
            f"{path}: ALTER is for backbones under 1B parameters, this one has {count / 1e9:.1f}B; take a smaller one."
        )


def most_positions(path: str | Path) -> int | None:
    """How many tokens a backbone has positions for, of a prompt with its answer; None where that is not bounded.

    Args:
        path: a folder, as ``resolve_backbone`` returns it.
    """
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(path).get_text_config(), "max_position_embeddings", None)


def backbone_fingerprint(path: str | Path) -> str:
    """Tells whether two folders hold the same backbone, without reading all of it.

    Covers the configuration as far as it says what is computed, and of every tensor its name, type, shape and some of
    its bytes; so it stays the same when the folder is copied or its weights are split into other files.

    Args:
        path: a folder, as ``resolve_backbone`` returns it.

    Returns:
        a SHA-256 in hexadecimal.
    """
    path = Path(path)
    config = {key: value for key, value in read_json(path / "config.json").items() if key not in _NOT_IDENTITY}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors: dict[str, bytes] = {}
    for file in weight_files(path):
        start, entries = _read_header(file)
        with file.open("rb", buffering=0) as stream:  # a buffer would read thirty times what is asked for
            for name, entry in entries.items():
                samples = _samples(stream, start, *entry["data_offsets"])
                tensors[name] = f"{name} {entry['dtype']} {entry['shape']} ".encode() + samples
    for name in sorted(tensors):
        digest.update(hashlib.sha256(tensors[name]).digest())
    return digest.hexdigest()


def _samples(stream: BinaryIO, start: int, low: int, high: int) -> bytes:
    """Some bytes spread evenly over one tensor, its first and last among them."""
    if high - low <= SAMPLES * SAMPLE_BYTES:
        places = [(low, high - low)]
    else:
        last = high - low - SAMPLE_BYTES
        places = [(low + last * part // (SAMPLES - 1), SAMPLE_BYTES) for part in range(SAMPLES)]
    chunks = []
    for place, size in places:
        stream.seek(start + place)
        chunks.append(stream.read(size))
    return b"".join(chunks)
